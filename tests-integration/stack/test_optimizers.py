"""Optimizers of every kind through the whole stack: by name, passed in, on several ranks, through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ds_core
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import Exported, assembled, assert_same_bits, exported

from .test_stack import Setting, assert_same, train

pytestmark = pytest.mark.rung_c


@pytest.mark.parametrize("name", ["Lamb", "lars", "muon", "Adafactor"])
def test_by_name_on_any_number_of_ranks_and_from_a_checkpoint(ranks: RankPool, tmp_path: Path, name: str) -> None:
    setting, folder = Setting(optimizer=name, precision="bf16"), str(tmp_path)
    want = ranks.run(train, setting, 4, size=1)
    assert_same(ranks.run(train, setting._replace(stage=2), 4, size=4), want)
    ranks.run(train, setting, 2, None, folder, size=2)
    resumed = ranks.run(train, setting._replace(stage=1), 4, folder, size=1)
    assert_same([outcome._replace(norms=want[0].norms[:2] + outcome.norms) for outcome in resumed], want)
    again = ranks.run(train, setting._replace(stage=0), 4, folder, size=4)
    assert_same([outcome._replace(norms=want[0].norms[:2] + outcome.norms) for outcome in again], want)


class RowScaled(torch.optim.Optimizer):
    """Divides each row of a gradient by its norm: nobody knows the class, and it declares nothing."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    norms = param.grad.view(param.shape[0], -1).norm(dim=1)
                    state["norms"] = [norms + state["norms"][0]] if state else [norms]
                    scale = state["norms"][0].view(-1, *[1] * (param.dim() - 1))
                    param.sub_(param.grad / (scale + 1e-6), alpha=group["lr"])


def train_client(rank: Rank, stage: int, steps: int, folder: str, resume: bool) -> list[Exported]:
    model = seeded()
    engine, *_ = ds_core.initialize(
        model,
        RowScaled(model.parameters(), lr=0.01),
        config={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
        group=rank.group,
    )
    if resume:
        engine.load_checkpoint(folder)
    while engine.global_steps < steps:
        for index in range(rank.rank, 4, rank.size):
            engine.backward(engine(micro_batch(4 * engine.global_steps + index)))
            engine.step()
    engine.save_checkpoint(folder)
    return exported(engine._sharded)


def test_a_class_that_nobody_knows(ranks: RankPool, tmp_path: Path) -> None:
    want = assembled(ranks.run(plain_loop, size=1))
    folder = str(tmp_path / "resized")
    for size, stage, steps in ((2, 3, 2), (1, 1, 3), (4, 2, 4)):
        last = ranks.run(train_client, stage, steps, folder, steps > 2, size=size)
    assert_same_bits(assembled(last), want)
    assert ("norms.0", "head.weight") in want


def plain_loop(_rank: Rank) -> list[Exported]:
    """The reference has no engine and no shards, and adds gradients in the same order."""
    model = seeded()
    optimizer = RowScaled(model.parameters(), lr=0.01)
    for step in range(4):
        leaves = [torch.autograd.grad(model(micro_batch(4 * step + i)), list(model.parameters())) for i in range(4)]
        sums = [(a + b) + (c + d) for a, b, c, d in zip(*leaves, strict=True)]
        for param, total in zip(model.parameters(), sums, strict=True):
            param.grad = total.mul_(0.25)
        optimizer.step()
    return [
        Exported(name, role, value.shape, 0, value.detach().reshape(-1))
        for name, param in model.named_parameters()
        for role, value in (("param", param), ("norms.0", optimizer.state[param]["norms"][0]))
    ]
