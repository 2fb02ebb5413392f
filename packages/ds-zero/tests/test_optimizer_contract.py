"""Every optimizer, at every stage, on several ranks, equals bit for bit itself over the whole model in a plain loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.state import Exported, State, assembled, exported
from torch import Tensor

from .optimizers import TABLE, Everything, groups_of, tokens_of

pytestmark = pytest.mark.rung_c

STAGES: list[dict[str, int]] = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3}]
NODES: list[dict[str, int]] = [{"stage": 2, "mics_shard_size": 2}, {"stage": 3, "zero_hpz_partition_size": 2}]
NUM_MICRO_BATCHES = 4
STEPS = 3
SCALE = 0.37  # as clipping would: a factor on the mean gradient
FEW = [name for name, row in TABLE.items() if row.few]


class Saved(NamedTuple):
    """A source of state: what the ranks exported, put together."""

    tensors: State
    shapes: Mapping[tuple[str, str], torch.Size]
    scalars: Mapping[str, Any]

    @property
    def roles(self) -> list[str]:
        return sorted({role for role, _ in self.tensors})

    def shapes_of(self, role: str) -> dict[str, torch.Size]:
        # of a parameter without elements there is no piece
        empty = {"empty": torch.Size([0, 5])} if role == "param" else {}
        return {name: shape for (of_role, name), shape in self.shapes.items() if of_role == role} | empty

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.tensors[role, name][start : start + out.numel()])


class Half(NamedTuple):
    """What one rank exports."""

    pieces: list[Exported]
    scalars: Mapping[str, Any]


def united(dictionaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge what the ranks say, as a checkpoint does; they must not contradict each other."""
    whole: dict[str, Any] = {}
    for said in dictionaries:
        for key, value in said.items():
            if isinstance(value, Mapping):
                whole[key] = united([whole.get(key, {}), value])
            else:
                assert whole.setdefault(key, value) == value, key
    return whole


def saved(halves: Iterable[Half]) -> Saved:
    halves = list(halves)
    shapes = {(piece.role, piece.name): piece.shape for half in halves for piece in half.pieces}
    return Saved(assembled(half.pieces for half in halves), shapes, united(half.scalars for half in halves))


def sharded_model(
    rank: Rank, name: str, settings: Mapping[str, int], compute: torch.dtype | None
) -> tuple[Everything, ds_zero.Sharded]:
    model = Everything()
    sharded = ds_zero.shard(
        model,
        TABLE[name].make,
        config=ds_zero.ZeroConfig(**settings),
        group=rank.group,
        param_groups=groups_of(model),
        precision=ds_zero.Precision(compute=compute),
    )
    return model, sharded


def train(rank: Rank, model: Everything, sharded: ds_zero.Sharded, steps: Iterable[int]) -> None:
    for step in steps:
        for index in range(rank.rank, NUM_MICRO_BATCHES, rank.size):
            model(tokens_of(step * NUM_MICRO_BATCHES + index)).backward()
        sharded.step(SCALE)


def train_at_all_stages(rank: Rank, name: str, compute: torch.dtype | None) -> list[list[Exported]]:
    results = []
    # on one rank all stages are placed alike, and nodes of two take four
    for settings in {1: STAGES[3:], 2: STAGES, 4: STAGES + NODES}[rank.size]:
        model, sharded = sharded_model(rank, name, settings, compute)
        train(rank, model, sharded, range(STEPS))
        assert all(not vars(param) for param in model.parameters()), "nothing is hung on parameters"
        results.append(exported(sharded))
    return results


def plain_loop(_rank: Rank, name: str, compute: torch.dtype | None, steps: int) -> State:
    """The reference has no flat buffer, no shard, no hook: only torch and the order of additions."""
    model = Everything()
    masters = {name: param.detach().clone() for name, param in model.named_parameters()}
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for each in trained:
        masters[each].requires_grad_()
    optimizer = TABLE[name].make(_over_masters(model, masters))
    model.to(compute)
    for step in range(steps):
        leaves = []
        for index in range(NUM_MICRO_BATCHES):
            loss = model(tokens_of(step * NUM_MICRO_BATCHES + index))
            grads = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
            leaves.append([grad.float() for grad in grads])
        for each, a, b, c, d in zip(trained, *leaves, strict=True):
            masters[each].grad = ((a + b) + (c + d)).mul_(SCALE * (1.0 / NUM_MICRO_BATCHES))
        optimizer.step()
        with torch.no_grad():
            for each, param in trained.items():
                param.copy_(masters[each])
    exact = {
        **dict(model.named_parameters()),
        **{each: masters[each] for each in trained},
    }  # frozen ones have no master
    state = {("param", each): param.detach().reshape(-1) for each, param in exact.items()}
    for each in trained:
        state |= {(role, each): value for role, value in _tensors(optimizer.state.get(masters[each], {}), "")}
    return state


def _over_masters(model: Everything, masters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    names = {param: name for name, param in model.named_parameters()}
    found = []
    for entry in groups_of(model):
        # torch's Adafactor divides by zero on an empty tensor
        own = [names[param] for param in entry["params"] if param.requires_grad and param.numel()]
        found.append({**entry, "params": [masters[name] for name in own], "param_names": own})
    return found


def _tensors(value: Any, path: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value.reshape(-1)
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{path}.{key}" if path else str(key))


def assert_contract(got: State, want: State) -> None:
    """All that was exported is equal to the reference, and all elements of the reference were exported."""
    different = [key for key, value in got.items() if not torch.equal(value, want[key])]
    assert not different, f"not equal bit for bit: {different}"
    # tensors of one element may be counters
    assert not {key for key, value in want.items() if value.numel() > 1} - got.keys()


@pytest.mark.parametrize("name", TABLE)
def test_equals_itself_without_shards(ranks: RankPool, name: str) -> None:
    (want,) = ranks.run(plain_loop, name, None, STEPS, size=1)
    for size in (1, 2, 4) if TABLE[name].few else (1, 2):
        for pieces in zip(*ranks.run(train_at_all_stages, name, None, size=size), strict=True):
            assert_contract(assembled(pieces), want)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", FEW)
def test_equals_itself_over_masters_in_low_precision(ranks: RankPool, name: str, compute: torch.dtype) -> None:
    (want,) = ranks.run(plain_loop, name, compute, STEPS, size=1)
    for pieces in zip(*ranks.run(train_at_all_stages, name, compute, size=2), strict=True):
        assert_contract(assembled(pieces), want)


def go_on(rank: Rank, name: str, settings: Mapping[str, int], source: Saved | None, steps: range) -> Half:
    model, sharded = sharded_model(rank, name, settings, None)
    if source is not None:
        train(rank, model, sharded, range(50, 52))  # other values and moments, to be replaced
        sharded.load_state(source)
    train(rank, model, sharded, steps)
    return Half(exported(sharded), sharded.state().scalars)


@pytest.mark.parametrize("name", FEW)
def test_state_survives_a_resize(ranks: RankPool, name: str) -> None:
    (want,) = ranks.run(plain_loop, name, None, 6, size=1)
    source: Saved | None = None
    for size, settings, steps in (
        (2, STAGES[3], range(2)),
        (1, STAGES[1], range(2, 3)),
        (2, STAGES[2], range(3, 4)),
        (4, NODES[0], range(4, 5)),
        (4, STAGES[0], range(5, 6)),
    ):
        source = saved(ranks.run(go_on, name, settings, source, steps, size=size))
    assert source is not None
    assert_contract(source.tensors, want)
