"""Sums over tensors: the bits do not depend on where the tensor is cut."""

from __future__ import annotations

import itertools
import math

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_zero.optim import Lamb
from ds_zero.tensor_sums import BLOCK, Node, local_sums, subtree_sums, subtrees
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Return elements of a tensor, and the blocks at which it is cut."""
    numel = draw(st.integers(1, 90 * BLOCK))
    num_blocks = -(-numel // BLOCK)
    cuts = draw(st.sets(st.integers(1, max(num_blocks - 1, 1)), max_size=6)) if num_blocks > 1 else set()
    return numel, [0, *sorted(cuts), num_blocks]


def root(nodes: dict[Node, float], num_blocks: int) -> float:
    """Add the tree recursively, from the top."""
    height = (num_blocks - 1).bit_length()

    def total(node: Node) -> float:
        if node in nodes:
            return nodes.pop(node)
        if node.place << node.height >= num_blocks:
            return 0.0
        return total(Node(node.height - 1, 2 * node.place)) + total(Node(node.height - 1, 2 * node.place + 1))

    result = total(Node(height, 0))
    assert not nodes, "no part of the tree is sent twice"
    return result


@settings(deadline=None)
@given(cut_tensors(), st.integers(0, 2**31))
def test_any_cut_gives_the_same_bits(cut: tuple[int, list[int]], seed: int) -> None:
    numel, bounds = cut
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 100
    ((whole,),) = local_sums([x], [[x]])
    nodes: dict[Node, float] = {}
    for first, end in itertools.pairwise(bounds):
        sums = subtree_sums(x[first * BLOCK : end * BLOCK].clone(), first, bounds[-1]).tolist()
        named = list(subtrees(first, end, bounds[-1]))
        assert len(named) <= 2 * math.log2(end - first) + 2
        nodes |= zip(named, sums, strict=True)
    assert root(nodes, bounds[-1]) == whole


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 2**31))
def test_the_sum_is_accurate(numel: int, seed: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    ((got,),) = local_sums([x], [[x]])
    assert got == pytest.approx(math.fsum(value * value for value in x.double().tolist()), rel=1e-14)


def sent_bytes(rank: Rank) -> int:
    sizes = []
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    sharded = ds_zero.shard(
        model, Lamb, config=ds_zero.ZeroConfig(stage=2, unit_classes=("Sequential",)), group=rank.group
    )
    comm = sharded._shared.mesh.everyone
    gather = comm.gather_rows
    comm.gather_rows = lambda row: sizes.append(row.nbytes) or gather(row)  # type: ignore[method-assign]
    model(torch.ones(1, 64)).sum().backward()
    sharded.step()
    (size,) = sizes
    return size


@pytest.mark.rung_c
def test_a_step_sends_one_small_message(ranks: RankPool) -> None:
    assert len(set(ranks.run(sent_bytes, size=2))) == 1
    assert 0 < ranks.run(sent_bytes, size=2)[0] <= 8 * 2 * 2 * 2 * math.log2(64 * 64 / BLOCK)


def test_groups_without_sums_are_refused_before_anything_is_cut() -> None:
    model = nn.Linear(40, 3)
    first, second = {"params": [model.weight]}, {"params": [model.bias]}
    for groups, index in (
        ([first, {**second, "update_kind": "elementwise"}], 1),
        ([{**first, "update_kind": "elementwise"}, {**second, "update_kind": "elementwise"}], 0),
        ([{**first, "update_kind": "tensor"}, second], 0),
    ):
        with pytest.raises(ValueError, match=f"parameter group {index} declares update_kind .*Lamb takes sums over"):
            ds_zero.shard(model, Lamb, param_groups=groups)
    assert model.weight._base is None  # still the user's own memory
    whole = [{**first, "update_kind": "tensor"}, {**second, "update_kind": "tensor"}]
    results = []
    for groups in (whole, [first, second]):
        torch.manual_seed(1)
        own = nn.Linear(40, 3)
        params = [{**group, "params": [param]} for group, param in zip(groups, own.parameters(), strict=True)]
        sharded = ds_zero.shard(own, Lamb, param_groups=params)
        own(torch.ones(2, 40)).square().sum().backward()
        sharded.step()
        results.append(own.weight.detach().clone())
    assert torch.equal(*results)
