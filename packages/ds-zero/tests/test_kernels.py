"""The plain torch kernels against float64, and the independence of the norm of where a buffer is cut."""

from __future__ import annotations

import pytest
import torch
from ds_zero.gradient import tree_root
from ds_zero.kernels import TorchKernels
from ds_zero.layout import LEAF
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_tree_sum_is_a_float32_sum(dtype: torch.dtype, count: int) -> None:
    pieces = [torch.randn(100, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]
    out = torch.empty(100)
    TorchKernels().tree_sum(out, pieces)
    exact = torch.stack([piece.double() for piece in pieces]).sum(0)
    magnitude = torch.stack([piece.double().abs() for piece in pieces]).sum(0)
    assert bool(((out - exact).abs() <= count * torch.finfo(torch.float32).eps * magnitude).all())


@pytest.mark.parametrize("count", [2, 4])
def test_tree_sum_may_write_over_a_piece(count: int) -> None:
    pieces = list(torch.randn(count, 100, generator=torch.Generator().manual_seed(0)).unbind())
    want = torch.empty(100)
    TorchKernels().tree_sum(want, pieces)
    TorchKernels().tree_sum(pieces[1], pieces)
    assert torch.equal(pieces[1], want)


@given(st.integers(1, 40), st.integers(0, 40))
def test_norm_does_not_depend_on_the_cut(num_leaves: int, cut: int) -> None:
    cut = min(cut, num_leaves)
    x = torch.randn(num_leaves * LEAF, generator=torch.Generator().manual_seed(num_leaves)) * 1e3
    kernels = TorchKernels()
    whole = kernels.chunk_sumsq(x, LEAF)
    parts = [kernels.chunk_sumsq(x[: cut * LEAF], LEAF)] if cut else []
    parts += [kernels.chunk_sumsq(x[cut * LEAF :], LEAF)] if cut < num_leaves else []
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("chunk", [64, 128, 1024, 4096])
def test_larger_chunks_are_subtrees(chunk: int) -> None:
    x = torch.randn(3 * 4096, generator=torch.Generator().manual_seed(0))
    kernels = TorchKernels()
    fine = kernels.chunk_sumsq(x, LEAF).view(-1, chunk // LEAF)
    assert torch.equal(kernels.chunk_sumsq(x, chunk), tree_root(fine))
    assert torch.allclose(kernels.chunk_sumsq(x, chunk), x.double().view(-1, chunk).square().sum(1), rtol=1e-13)


def test_zeros_behind_the_data_change_no_root() -> None:
    rows = torch.rand(3, 16, dtype=torch.float64)
    rows[:, 5:] = 0
    assert torch.equal(tree_root(rows), tree_root(rows[:, :8]))
