"""The summation tree: its shape, its independence of how leaves are dealt to ranks, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from ds_zero.gradient import TreeSum
from ds_zero.kernels import TorchKernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

CPU = torch.device("cpu")


def leaves_of(count: int, numel: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(numel, generator=generator) * 10.0 ** (index % 7 - 3) for index in range(count)]


def by_definition(leaves: list[Tensor]) -> Tensor:
    """Neighbours first; a last one without a neighbour goes up as it is."""
    while len(leaves) > 1:
        pairs = [a + b for a, b in zip(leaves[::2], leaves[1::2], strict=False)]
        leaves = pairs + leaves[2 * len(pairs) :]
    return leaves[0]


def counted(leaves: list[Tensor], tree: TreeSum) -> Tensor:
    for leaf in leaves:
        tree.push(tree.target().copy_(leaf))
    total = tree.total()
    assert total is not None
    return total.clone()


@given(st.integers(1, 40))
def test_binary_counter_is_the_tree_of_neighbours(count: int) -> None:
    leaves = leaves_of(count)
    assert torch.equal(counted(leaves, TreeSum(5, torch.float32, CPU)), by_definition(leaves))


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 12))
def test_ranks_and_steps_form_one_tree(num_ranks: int, num_steps: int) -> None:
    leaves = leaves_of(num_ranks * num_steps)
    tree = TreeSum(5, torch.float32, CPU)
    for step in range(num_steps):
        target = tree.target()
        TorchKernels().tree_sum(target, leaves[step * num_ranks : (step + 1) * num_ranks])
        tree.push(target)
    assert torch.equal(tree.total(), by_definition(leaves))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16])
def test_partial_sums_are_few(num_steps: int) -> None:
    tree = TreeSum(64, torch.float32, CPU)
    for _ in range(3):
        counted(leaves_of(num_steps, 64), tree)
        tree.clear()
        assert tree.nbytes <= (math.log2(num_steps) + 1) * 64 * 4


def test_steady_state_allocates_nothing() -> None:
    tree = TreeSum(5, torch.float32, CPU)
    addresses = []
    for _ in range(3):
        tree.push(tree.target().zero_())
        total = tree.total()
        assert total is not None
        addresses.append(total.data_ptr())
        tree.clear()
    assert len(set(addresses)) == 1


@given(st.integers(1, 12))
def test_home_may_be_overwritten_between_leaves(count: int) -> None:
    leaves, home = leaves_of(count), torch.empty(5)
    tree = TreeSum(5, torch.float32, CPU, home)
    for leaf in leaves:
        tree.vacate()
        home.fill_(float("nan"))  # as the next backward pass would
        tree.push(tree.target().copy_(leaf))
    assert torch.equal(tree.total(), by_definition(leaves))


def test_single_leaf_stays_at_home() -> None:
    home = torch.empty(5)
    tree = TreeSum(5, torch.float32, CPU, home)
    for _ in range(3):
        tree.vacate()
        tree.push(tree.target().fill_(1.0))
        assert tree.total() is home
        tree.clear()
    assert tree.nbytes == 0


def test_no_leaf_no_sum() -> None:
    assert TreeSum(5, torch.float32, CPU).total() is None
