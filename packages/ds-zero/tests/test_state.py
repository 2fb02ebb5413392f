"""State as pieces: exported on some ranks at one stage, loaded on others at another, training goes on bit-equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from torch import Tensor

from .helpers import Run, assemble_run, assembled, assert_same_bits, build, exported, train_steps

pytestmark = pytest.mark.rung_c


class Memory:
    """A source of state: whole tensors in memory."""

    def __init__(self, tensors: Mapping[tuple[str, str], Tensor], scalars: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self.scalars = scalars
        self.roles = sorted({role for role, _ in tensors})

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._tensors[role, name][start : start + out.numel()])


def first_half(rank: Rank, run: Run) -> tuple[list[Any], Any]:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(4))
    return exported(sharded), sharded.state().scalars


def second_half(rank: Rank, run: Run, tensors: Mapping[tuple[str, str], Tensor], scalars: Any) -> list[Any]:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(20, 22))  # other weights and moments, to be replaced
    sharded.load_state(Memory(tensors, scalars))
    train_steps(rank, run, model, sharded, range(4, 8))
    return exported(sharded)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 3), (2, 1)), ((2, 1), (1, 0)), ((1, 0), (4, 3)), ((2, 2), (4, 0)), ((4, 0), (2, 3))],
    ids=lambda pair: f"{pair[0]} ranks stage {pair[1]}",
)
def test_resize_changes_no_bit(
    ranks: RankPool, before: tuple[int, int], after: tuple[int, int], compute: torch.dtype | None
) -> None:
    run = Run(num_micro_batches=4, compute=compute)
    want = assemble_run(ranks, run._replace(stage=0), size=1)
    halves = ranks.run(first_half, run._replace(stage=before[1]), size=before[0])
    tensors, scalars = assembled(pieces for pieces, _ in halves), halves[0][1]
    results = ranks.run(second_half, run._replace(stage=after[1]), tensors, scalars, size=after[0])
    assert_same_bits(assembled(results), want)


def wrong_optimizer(rank: Rank) -> str:
    _, sharded = build(rank, Run(optimizer="SGD"))
    _, other = build(rank, Run(optimizer="AdamW"))
    with pytest.raises(ValueError, match="holds the state of optimizer AdamW, this run uses SGD") as error:
        sharded.load_state(Memory({}, other.state().scalars))
    return str(error.value)


def test_state_of_another_optimizer_is_refused(ranks: RankPool) -> None:
    assert "load_optimizer_states=False" in ranks.run(wrong_optimizer, size=1)[0]


class WithBuffers(torch.nn.Module):
    """Batch norm has statistics; the mask is not part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x))
        return out


def test_buffers_belong_to_the_state() -> None:
    model = WithBuffers()
    sharded = ds_zero.shard(model, None)
    model(torch.randn(8, 4))
    state = sharded.state()
    buffers = {piece.name: piece.data for piece in state.pieces if piece.role == "buffer"}
    assert buffers.keys() == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    tensors = {(piece.role, piece.name): piece.data.clone() for piece in state.pieces}
    assert state.shapes["norm.num_batches_tracked"] == torch.Size([])
    other = WithBuffers()
    ds_zero.shard(other, None).load_state(Memory(tensors, state.scalars))
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert torch.equal(other.linear.weight, model.linear.weight)


def test_tied_parameters_are_stored_once() -> None:
    from ds_testkit.models import seeded

    model = seeded(tied=True)
    state = ds_zero.shard(model, None).state()
    assert "head.weight" not in state.shapes
    assert state.scalars["aliases"] == {"head.weight": "tokens.weight"}
