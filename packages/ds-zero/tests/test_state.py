"""State as pieces: exported on some ranks at one stage, loaded on others at another, training goes on bit-equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_testkit.state import assembled, assert_same_bits, exported
from torch import Tensor

from .helpers import Run, assemble_run, build, train_steps

pytestmark = pytest.mark.rung_c


class Memory:
    """A source of state: whole tensors in memory, flattened."""

    def __init__(
        self, tensors: Mapping[tuple[str, str], Tensor], scalars: Mapping[str, Any], shapes: Mapping[str, torch.Size]
    ) -> None:
        self._tensors = tensors
        self._shapes = shapes
        self.scalars = scalars
        self.roles = sorted({role for role, _ in tensors})

    def shapes_of(self, role: str) -> dict[str, torch.Size]:
        return {name: self._shapes[name] for of_role, name in self._tensors if of_role == role}

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._tensors[role, name][start : start + out.numel()])


def first_half(rank: Rank, run: Run) -> tuple[list[Any], Any, Any]:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(4))
    state = sharded.state()
    return exported(sharded), state.scalars, state.shapes


def second_half(rank: Rank, run: Run, source: Memory) -> list[Any]:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(20, 22))  # other weights and moments, to be replaced
    sharded.load_state(source)
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
    source = Memory(assembled(pieces for pieces, _, _ in halves), *halves[0][1:])
    results = ranks.run(second_half, run._replace(stage=after[1]), source, size=after[0])
    assert_same_bits(assembled(results), want)


def wrong_optimizer(rank: Rank) -> str:
    _, sharded = build(rank, Run(optimizer="SGD"))
    _, other = build(rank, Run(optimizer="AdamW"))
    with pytest.raises(ValueError, match="holds the state of optimizer AdamW, this run uses SGD") as error:
        sharded.load_state(Memory({}, other.state().scalars, {}))
    return str(error.value)


def test_state_of_another_optimizer_is_refused(ranks: RankPool) -> None:
    assert "load_optimizer_states=False" in ranks.run(wrong_optimizer, size=1)[0]


def averaged(rank: Rank) -> tuple[list[Any], Any, Any]:
    """Two parameter groups whose counters differ: ASGD's step size follows the learning rate."""
    model, sharded = build_averaged(rank)
    train_steps(rank, Run(num_micro_batches=2), model, sharded, range(3))
    state = sharded.state()
    return exported(sharded), state.scalars, state.shapes


def build_averaged(rank: Rank) -> Any:
    model = seeded()
    params = list(model.parameters())
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.ASGD(groups, lambd=0.5),
        config=ds_zero.ZeroConfig(stage=2),
        group=rank.group,
        param_groups=[{"params": params[:4], "lr": 0.1}, {"params": params[4:], "lr": 0.01}],
    )
    return model, sharded


def averaged_again(rank: Rank, source: Memory) -> list[float]:
    _, sharded = build_averaged(rank)
    sharded.load_state(source)
    optimizer = sharded.optimizer
    return [optimizer.state[group["params"][0]]["eta"].item() for group in optimizer.param_groups if group["params"]]


def test_counters_may_differ_between_parameter_groups(ranks: RankPool) -> None:
    (result,) = ranks.run(averaged, size=1)
    pieces, scalars, shapes = result
    etas = {group: counters["eta"]["value"] for group, counters in scalars["optimizer"]["counters"].items()}
    assert etas["0"] > 5 * etas["1"]
    (loaded,) = ranks.run(averaged_again, Memory(assembled([pieces]), scalars, shapes), size=1)
    assert loaded == pytest.approx([etas["0"], etas["1"]])
    by_two = ranks.run(averaged, size=2)
    for _, scalars_of_rank, _ in by_two:
        for group, counters in scalars_of_rank["optimizer"]["counters"].items():
            assert counters["eta"]["value"] == pytest.approx(etas[group])


def fresh_state(rank: Rank) -> int:
    _, untrained = build(rank, Run())
    state = untrained.state()
    source = Memory(assembled([exported(untrained)]), state.scalars, state.shapes)
    model, sharded = build(rank, Run())
    train_steps(rank, Run(), model, sharded, range(2))
    sharded.load_state(source)
    return len(sharded.optimizer.state)


def test_state_from_before_the_first_step_empties_the_optimizer(ranks: RankPool) -> None:
    assert ranks.run(fresh_state, size=1) == [0]


def does_not_fit(rank: Rank) -> tuple[str, str, bool, bool, bool]:
    model, sharded = build(rank, Run())
    train_steps(rank, Run(), model, sharded, range(1))
    state = sharded.state()
    tensors = assembled([exported(sharded)])
    exact = {key: value.clone() for key, value in tensors.items()}
    train_steps(rank, Run(), model, sharded, range(1, 3))
    lacking = {key: value for key, value in tensors.items() if key[1] != "head.weight"}
    messages = []
    for source in (
        Memory(lacking, state.scalars, state.shapes),
        Memory(tensors, state.scalars, {**state.shapes, "head.weight": torch.Size([3])}),
    ):
        before = assembled([exported(sharded)])
        with pytest.raises(ValueError, match="nothing was changed") as error:
            sharded.load_state(source)
        messages.append(str(error.value))
        assert_same_bits(assembled([exported(sharded)]), before)
    head = [assembled([exported(sharded)])[role, "head.weight"] for role in ("param", "exp_avg")]
    sharded.load_state(Memory(lacking, state.scalars, state.shapes), strict=False)
    after = assembled([exported(sharded)])
    kept = [torch.equal(after[role, "head.weight"], old) for role, old in zip(("param", "exp_avg"), head, strict=True)]
    others = all(torch.equal(after[key], exact[key]) for key in lacking)
    return messages[0], messages[1], kept[0], kept[1], others


def test_nothing_is_changed_by_a_state_that_does_not_fit(ranks: RankPool) -> None:
    missing, shape, param_kept, moment_kept, others_loaded = ranks.run(does_not_fit, size=1)[0]
    assert "param 'head.weight' is missing there; exp_avg 'head.weight' is missing there" in missing
    assert "param 'head.weight' has shape [61, 32] here and [3] there" in shape
    assert param_kept
    assert moment_kept
    assert others_loaded


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
    ds_zero.shard(other, None).load_state(Memory(tensors, state.scalars, state.shapes))
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert torch.equal(other.linear.weight, model.linear.weight)


def test_tied_parameters_are_stored_once() -> None:
    model = seeded(tied=True)
    state = ds_zero.shard(model, None).state()
    assert "head.weight" not in state.shapes
    assert state.scalars["aliases"] == {"head.weight": "tokens.weight"}
