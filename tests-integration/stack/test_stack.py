"""ds-core, ds-zero and ds-kernels together: the same bits on any number of ranks and stages, through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_core.checkpoint import load_full
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_testkit.state import Exported, State, assembled, assert_same_bits, exported
from torch import Tensor
from torch.utils.data import Dataset

pytestmark = pytest.mark.rung_c


class Sequences(Dataset[Tensor]):
    """64 sequences of 17 tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(61, (17,), generator=torch.Generator().manual_seed(index))


class Setting(NamedTuple):
    """How to train."""

    stage: int = 3
    precision: str = "fp32"  # or "bf16", "fp16"
    micro_batches: int = 4  # per step, over all ranks
    optimizer: str = "AdamW"
    backend: str = "auto"

    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": 2 * self.micro_batches,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.3,
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}},
            "zero_optimization": {"stage": self.stage},
            "kernels": {"backend": self.backend},
            **({} if self.precision == "fp32" else {self.precision: {"enabled": True}}),
        }


class Outcome(NamedTuple):
    losses: list[float]  # of this rank's micro-batches
    norms: list[float | None]
    pieces: list[Exported]
    rate: list[float]


def train(rank: Rank, setting: Setting, steps: int, resume: str | None = None, save: str | None = None) -> Outcome:
    """Train up to global step ``steps`` on real dropout and dealt data."""
    engine, _, loader, schedule = ds_core.initialize(
        seeded(dropout=0.1), config=setting.config(), training_data=Sequences(), group=rank.group
    )
    if resume is not None:
        engine.load_checkpoint(resume)
    losses, norms = [], []
    while engine.global_steps < steps:
        for batch in loader:
            loss = engine(batch)
            engine.backward(loss)
            losses.append(loss.item())
            if engine.step().boundary:
                norms.append(engine.last_outcome.grad_norm)
                if engine.global_steps == steps:
                    break
    if save is not None:
        engine.save_checkpoint(save)
    return Outcome(losses, norms, exported(engine._sharded), schedule.get_last_lr())


def whole(outcomes: list[Outcome]) -> State:
    return assembled(outcome.pieces for outcome in outcomes)


def assert_same(got: list[Outcome], want: list[Outcome]) -> None:
    assert_same_bits(whole(got), whole(want))
    assert all(outcome.norms == want[0].norms for outcome in got)
    assert got[0].rate == want[0].rate


@pytest.mark.parametrize("micro_batches", [4, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_same_bits_for_every_size_and_stage(ranks: RankPool, precision: str, micro_batches: int) -> None:
    setting = Setting(stage=0, precision=precision, micro_batches=micro_batches)
    want = ranks.run(train, setting, 8, size=1)
    for stage in (0, 1, 2, 3):
        for size in (1, 2, 4):
            got = ranks.run(train, setting._replace(stage=stage), 8, size=size)
            assert_same(got, want)
            dealt = [got[index % size].losses[index // size] for index in range(8 * micro_batches)]
            assert dealt == want[0].losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 3), (1, 0)), ((1, 1), (2, 3)), ((2, 2), (4, 1))],
    ids=lambda pair: f"{pair[0]} ranks stage {pair[1]}",
)
def test_checkpoint_on_some_ranks_goes_on_on_others(
    ranks: RankPool, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], precision: str
) -> None:
    setting, folder = Setting(precision=precision), str(tmp_path)
    want = ranks.run(train, setting, 8, size=1)
    ranks.run(train, setting._replace(stage=before[1]), 4, None, folder, size=before[0])
    resumed = ranks.run(train, setting._replace(stage=after[1]), 8, folder, folder, size=after[0])
    assert_same([outcome._replace(norms=want[0].norms[:4] + outcome.norms) for outcome in resumed], want)
    full, state = load_full(tmp_path), whole(want)
    model = seeded()
    assert full.keys() == dict(model.named_parameters()).keys()
    for name, tensor in full.items():
        assert tensor.shape == model.get_parameter(name).shape
        assert torch.equal(tensor.flatten(), state["param", name])
    assert torch.equal(load_full(tmp_path, role="exp_avg")["head.weight"].flatten(), state["exp_avg", "head.weight"])


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_every_backend_is_the_same_on_any_number_of_ranks(ranks: RankPool, optimizer: str) -> None:
    setting = Setting(optimizer=optimizer, backend="reference", precision="bf16")
    assert_same(ranks.run(train, setting, 4, size=4), ranks.run(train, setting, 4, size=1))


def trained_under_watch(rank: Rank, watched: bool, optimizer: str) -> list[Exported]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)])
    timeouts = {"watchdog_timeout": 60.0, "fingerprint_timeout": 60.0} if watched else {}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3, **timeouts},
    }
    engine, *_ = ds_core.initialize(model, config=config, group=rank.group)
    for step in range(3):
        engine.backward(engine(torch.full((2, 8), float(step + rank.rank))).square().mean())
        engine.step()
    return exported(engine._sharded)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_watchdog_and_fingerprints_change_no_bit(ranks: RankPool, optimizer: str) -> None:
    watched, bare = (assembled(ranks.run(trained_under_watch, watched, optimizer, size=2)) for watched in (True, False))
    assert_same_bits(watched, bare)
