"""Whole tensors: who owns them, what travels, what is declared, and what is refused."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.threads import on_threads
from ds_zero.collectives import DenseCollectives, LocalCollectives, PeerCollectives, collectives_of
from ds_zero.host import HostCollectives
from ds_zero.kernels import TorchKernels
from ds_zero.kinds import UpdateKind
from ds_zero.layout import Spec, plan
from ds_zero.optim import Lamb, Muon
from ds_zero.owners import Owned, balance, inside, routes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .optimizers import Shampoo

# Owners #


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_no_rank_has_more_than_the_mean_and_one_item(costs: list[int], num_ranks: int) -> None:
    owners = balance(costs, num_ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert max(loads) <= sum(costs) / num_ranks + max(costs, default=0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_what_travels_covers_each_tensor_once(shapes: list[list[int]], num_ranks: int, data: st.DataObject) -> None:
    layout = plan([Spec(f"p{index}", torch.Size(shape), 0) for index, shape in enumerate(shapes)], num_ranks)
    tensors = [Owned(0, slot, data.draw(st.integers(0, num_ranks - 1))) for slot in layout.slots if slot.numel]
    counts = [torch.zeros(tensor.slot.numel, dtype=torch.int) for tensor in tensors]
    by_rank = [routes(tensors, [layout], num_ranks, rank) for rank in range(num_ranks)]
    for owner, (_, here) in enumerate(by_rank):
        for holder, parts in enumerate(here):
            assert by_rank[holder].away[owner] == parts, "both sides know the same"
            for part in parts:
                assert tensors[part.tensor].owner == owner
                counts[part.tensor][part.start : part.start + part.numel] += 1
    for tensor, count in zip(tensors, counts, strict=True):
        at_home = inside(tensor.slot, layout.shard_of(tensor.owner))
        assert bool((count == (0 if at_home else 1)).all())


def test_a_matrix_costs_its_shorter_side_more() -> None:
    assert UpdateKind.MATRIX.cost(torch.Size([8, 3])) == 8 * 3 * 3
    assert UpdateKind.MATRIX.cost(torch.Size([4, 2, 3])) == 4 * 6 * 4
    assert UpdateKind.TENSOR.cost(torch.Size([8, 3])) == 24
    assert UpdateKind.MATRIX.cost(torch.Size([])) == 1
    assert UpdateKind.MATRIX.cost(torch.Size([0, 5])) == 0


# Exchange #


def exchanged(rank: int, comm: Any) -> None:
    """Rank r sends ``r + 2 s`` elements to rank s, and none to those above it."""
    outgoing = [torch.full((rank + 2 * to if to <= rank else 0,), 10.0 * rank + to) for to in range(comm.size)]
    incoming = [torch.empty(by + 2 * rank if rank <= by else 0) for by in range(comm.size)]
    comm.exchange(outgoing, incoming, key=7).wait()
    for by, received in enumerate(incoming):
        assert torch.equal(received, torch.full_like(received, 10.0 * by + rank)), (rank, by)


def exchanged_between_processes(rank: Rank, *, host_memory: bool) -> str:
    comm = collectives_of(rank.group, TorchKernels(), device=torch.device("cpu"), host_memory=host_memory)
    for _ in range(3):
        exchanged(rank.rank, comm)
    return type(comm).__name__


@pytest.mark.rung_c
@pytest.mark.parametrize("host_memory", [False, True], ids=["messages", "host memory"])
def test_processes_exchange(ranks: RankPool, host_memory: bool) -> None:
    for size in (1, 2, 4):
        kinds = set(ranks.run(partial(exchanged_between_processes, host_memory=host_memory), size=size))
        wanted = HostCollectives if host_memory else PeerCollectives
        assert kinds == {(wanted if size > 1 else LocalCollectives).__name__}


@pytest.mark.rung_b
def test_one_collective_exchanges() -> None:
    def on_rank(rank: int) -> None:
        exchanged(rank, DenseCollectives(torch.distributed.group.WORLD, TorchKernels()))

    on_threads(5, on_rank)


# Declarations #


class Declared(torch.optim.SGD):
    """Elementwise, and says so."""

    def __init__(self, params: Any) -> None:
        super().__init__([{"update_kind": "elementwise", **entry} for entry in params], lr=0.1)


def shapes_of(make: Any, param_groups: Any = None) -> list[list[int]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = None if param_groups is None else param_groups(model)
    sharded = ds_zero.shard(model, make, param_groups=groups)
    assert sharded.optimizer is not None
    return [list(param.shape) for group in sharded.optimizer.param_groups for param in group["params"]]


def test_the_kind_decides_what_the_optimizer_holds() -> None:
    flat = shapes_of(lambda groups: torch.optim.SGD(groups, lr=0.1))
    assert all(len(shape) == 1 for shape in flat)
    assert len(flat) == 2, "one for each flat"
    assert shapes_of(Declared) == flat
    assert sorted(shapes_of(Lamb)) == [[2], [3], [6], [12]]
    assert sorted(shapes_of(Shampoo)) == sorted([[3], [2], [2, 3], [3, 4]])
    assert len(shapes_of(Muon)) == 2 + 2, "matrices, and one flat of the rest per unit"


def test_a_group_may_declare_for_its_optimizer() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, last = model.children()
        return [{"params": first.parameters(), "update_kind": "elementwise"}, {"params": last.parameters()}]

    assert sorted(shapes_of(Shampoo, groups)) == [[2], [2, 3], [35]]


def test_an_unknown_class_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=ds_zero.__name__):
        shapes_of(Shampoo)
        shapes_of(Muon)
        shapes_of(lambda groups: torch.optim.AdamW(groups))
    (line,) = caplog.messages
    assert "Shampoo does not declare 'update_kind': one rank steps each tensor whole" in line


def test_what_cannot_run_on_partitioned_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS cannot step partitioned parameters: it evaluates the loss several"):
        shapes_of(lambda groups: torch.optim.LBFGS(groups[0]["params"]))
    with pytest.raises(ValueError, match="SparseAdam cannot step"):
        shapes_of(lambda groups: torch.optim.SparseAdam(groups))
    with pytest.raises(ValueError, match="one of elementwise, statistics, tensor, matrix; got 'rows'"):
        shapes_of(
            lambda groups: torch.optim.SGD(groups, lr=0.1),
            lambda model: [{"params": model.parameters(), "update_kind": "rows"}],
        )


def test_marks_of_parameters_reach_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.use_muon = False
    sharded = ds_zero.shard(model, Muon)
    muon, adam = sharded.optimizer.param_groups  # type: ignore[union-attr]
    assert [list(param.shape) for param in muon["params"]] == [[2, 3]]
    assert len(adam["params"]) == 2


# State #


class Odd(torch.optim.SGD):
    """Keeps something that cannot be saved."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["hook"] = object()


def test_state_that_cannot_be_saved_is_named() -> None:
    model = nn.Linear(2, 2)
    sharded = ds_zero.shard(model, lambda groups: Odd(groups, lr=0.1))
    model(torch.ones(1, 2)).sum().backward()
    sharded.step()
    with pytest.raises(NotImplementedError, match=r"optimizer state 'hook' is a object.*cannot be saved"):
        sharded.state()


class Empty:
    """A source whose optimizer stepped shards."""

    roles: tuple[str, ...] = ()

    def __init__(self, scalars: Any) -> None:
        self.scalars = scalars

    def shapes_of(self, role: str) -> dict[str, torch.Size]:
        raise AssertionError(f"nothing is read: {role}")

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        raise AssertionError(f"nothing is read: {role} {name} {start} {out.shape}")


def test_state_that_was_cut_in_another_way_is_refused() -> None:
    def sharded(kind: str) -> ds_zero.Sharded:
        return ds_zero.shard(
            nn.Linear(2, 2), lambda groups: torch.optim.SGD([{**groups[0], "update_kind": kind}], lr=0.1)
        )

    source = Empty(sharded("elementwise").state().scalars)
    with pytest.raises(ValueError, match=r"groups \[\] as whole tensors, this run does so with \[0\].*nothing"):
        sharded("tensor").load_state(source)


# Memory #


def held(rank: Rank, stage: int) -> tuple[int, int]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    sharded = ds_zero.shard(model, Muon, config=ds_zero.ZeroConfig(stage=stage), group=rank.group)
    model(torch.ones(1, 64)).sum().backward()
    sharded.step()
    return sharded.memory().state, sum(param.numel() for param in model.parameters())


@pytest.mark.rung_c
def test_a_rank_holds_its_shard_and_its_tensors(ranks: RankPool) -> None:
    for size in (2, 4):
        for state, numel in ranks.run(held, 3, size=size):
            # momentum of the owned tensors, and their values; the shard itself is the parameters
            assert state == 2 * 4 * numel // size
    for state, numel in ranks.run(held, 0, size=2):
        assert state == 4 * numel, "replicated: all momenta, and views of the parameters"


# Access #


def changed_from_outside(rank: Rank, stage: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])
    sharded = ds_zero.shard(model, Muon, config=ds_zero.ZeroConfig(stage=stage), group=rank.group)
    for step in range(2):
        if step:
            for index, name in enumerate(dict(model.named_parameters())):
                sharded.access.set_full_param(name, sharded.access.full_param(name) + 0.1 * (index + 1))
            with sharded.access.gathered(model[1], writeback_from=0), torch.no_grad():
                model[1].weight.mul_(2)
        for _ in range(2 // rank.size):
            model(torch.ones(1, 24)).square().sum().backward()
        sharded.step()
    return [sharded.access.full_param(name) for name in dict(model.named_parameters())]


@pytest.mark.rung_c
def test_owners_step_values_that_were_written_from_outside(ranks: RankPool) -> None:
    (want,) = ranks.run(changed_from_outside, 0, size=1)
    for stage in (1, 3):
        for got in ranks.run(changed_from_outside, stage, size=2):
            assert all(map(torch.equal, got, want))
