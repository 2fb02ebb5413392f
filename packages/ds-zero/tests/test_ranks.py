"""Numbers of ranks: eight as threads over one collective each, and three, where bits cannot be equal."""

from __future__ import annotations

import logging

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_testkit.state import Exported, State, assembled, assert_same_bits, exported
from ds_testkit.threads import on_threads
from ds_zero.collectives import DenseCollectives, collectives_of
from ds_zero.kernels import TorchKernels
from torch import distributed as dist

from .helpers import Run, assemble_run, make_optimizer, train_steps


def train_on_threads(run: Run, size: int) -> State:
    """Threads share torch's generator, so the models are made before they start."""
    models = [seeded(**run.model) for _ in range(size)]

    def on_rank(rank: int) -> list[Exported]:
        comm = collectives_of(dist.group.WORLD, TorchKernels(), device=torch.device("cpu"))
        assert type(comm) is DenseCollectives
        sharded = ds_zero.shard(
            models[rank],
            make_optimizer(run.optimizer),
            config=ds_zero.ZeroConfig(stage=run.stage),
            precision=ds_zero.Precision(compute=run.compute),
        )
        train_steps(Rank(rank, size, None), run, models[rank], sharded, range(run.steps))
        return exported(sharded)

    return assembled(on_threads(size, on_rank))


@pytest.fixture
def one_thread() -> object:
    """Bits of torch's own kernels may depend on the number of threads; ranks of the pool have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.rung_b
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_eight_ranks_give_the_bits_of_one(ranks: RankPool, stage: int, compute: torch.dtype | None) -> None:
    run = Run(stage=stage, num_micro_batches=8, compute=compute, steps=3)
    assert_same_bits(train_on_threads(run, 8), assemble_run(ranks, run, size=1))


def train_with_two_communicators(run: Run, size: int) -> State:
    models = [seeded(**run.model) for _ in range(size)]

    def on_rank(rank: int) -> list[Exported]:
        kernels = TorchKernels()
        comm = DenseCollectives(dist.group.WORLD, kernels, dist.new_group(list(range(size))))
        sharded = ds_zero.shard(
            models[rank],
            make_optimizer(run.optimizer),
            config=ds_zero.ZeroConfig(stage=run.stage),
            parts=ds_zero.Parts(kernels=kernels, collectives=comm),
        )
        train_steps(Rank(rank, size, None), run, models[rank], sharded, range(run.steps))
        return exported(sharded)

    return assembled(on_threads(size, on_rank))


@pytest.mark.rung_b
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", [2, 3])
def test_reductions_may_have_a_communicator_of_their_own(stage: int) -> None:
    run = Run(stage=stage, num_micro_batches=8, steps=3)
    assert_same_bits(train_with_two_communicators(run, 4), train_on_threads(run, 4))


@pytest.mark.rung_c
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_three_ranks_agree_to_rounding(ranks: RankPool, stage: int) -> None:
    run = Run(stage=stage, num_micro_batches=6, steps=3)
    three, one = (assemble_run(ranks, run, size=size) for size in (3, 1))
    for key, value in one.items():
        torch.testing.assert_close(three[key], value, rtol=1e-4, atol=1e-6)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def warned(rank: Rank, exact: bool) -> tuple[list[str], str]:
    handler = Lines()
    logger = logging.getLogger(ds_zero.__name__)
    logger.addHandler(handler)
    error = ""
    try:
        ds_zero.shard(seeded(), None, group=rank.group, config=ds_zero.ZeroConfig(require_exact=exact))
    except ValueError as raised:
        error = str(raised)
    logger.removeHandler(handler)
    return handler.lines, error


@pytest.mark.rung_c
def test_three_ranks_are_said_once_or_refused(ranks: RankPool) -> None:
    (first, *others) = ranks.run(warned, False, size=3)
    (line,), error = first
    assert "3 ranks: not a power of two" in line
    assert not error
    assert others == [([], "")] * 2
    for lines, error in ranks.run(warned, True, size=3):
        assert not lines
        assert "require_exact=False" in error
