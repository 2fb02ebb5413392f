"""How far one warm training step reaches: files, functions and calls that cross a file."""

from __future__ import annotations

import collections
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import ds_core
import ds_kernels
import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from torch import nn

pytestmark = pytest.mark.rung_c

_ROOTS = tuple(str(Path(package.__file__).parent) for package in (ds_core, ds_zero, ds_kernels))


class Reach(NamedTuple):
    files: dict[str, int]  # calls into each
    functions: int
    crossing: int  # calls whose caller (of ours) stands in another file


class _Profile:
    """Counts calls into our files, on all threads."""

    def __init__(self) -> None:
        self.files: collections.Counter[str] = collections.Counter()
        self.functions: set[tuple[str, int]] = set()
        self.crossing = 0

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(_ROOTS):
            return
        self.files[name] += 1
        self.functions.add((name, frame.f_code.co_firstlineno))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(_ROOTS):
            caller = caller.f_back
        self.crossing += caller is not None and caller.f_code.co_filename != name


def profiled(rank: Rank, stage: int) -> Reach:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)], nn.Linear(32, 1))
    engine, *_ = ds_core.initialize(
        model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
        },
        group=rank.group,
    )
    batch = torch.randn(2, 32, dtype=torch.bfloat16)

    def step() -> None:
        engine.backward(engine(batch).float().sum())
        engine.step()

    for _ in range(3):
        step()
    profile = _Profile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    step()
    sys.setprofile(None)
    threading.setprofile(None)
    files = {str(Path(*Path(name).parts[-2:])): count for name, count in profile.files.items()}
    return Reach(files, len(profile.functions), profile.crossing)


def test_a_stage_3_step_stays_within_its_budget(ranks: RankPool) -> None:
    for reach in ranks.run(profiled, 3, size=2):
        assert reach.functions <= 130
        assert reach.crossing <= 300
        assert len(reach.files) <= 10, sorted(reach.files)
