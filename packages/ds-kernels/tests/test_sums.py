"""Sums follow the trees that they promise, and are accurate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def by_counter(pieces):
    """The tree of a binary counter: ``(sum, leaves)`` pairs, merged while two have as many leaves."""
    held = []
    for piece in pieces:
        held.append((piece.float(), 1))
        while len(held) > 1 and held[-1][1] == held[-2][1]:
            (right, n), (left, _) = held.pop(), held.pop()
            held.append((left + right, 2 * n))
    while len(held) > 1:
        (right, n), (left, m) = held.pop(), held.pop()
        held.append((left + right, n + m))
    return held[0][0]


@pytest.mark.parametrize("num_pieces", [*range(1, 10), 13, 16, 31, 64, 100])
@pytest.mark.parametrize("dtype", FLOATS)
def test_tree_sum_follows_the_binary_counter(backend, dtype, num_pieces):
    pieces = list(torch.randn(num_pieces, 131).to(dtype))
    out = torch.full((131,), torch.nan)
    backend.tree_sum(out, pieces)
    assert torch.equal(out, by_counter(pieces))


def test_tree_sum_of_three_and_six(backend):
    # Values for which every other order of additions gives another result.
    a, b, c, d, e, f = torch.tensor([[1.0], [2.0**-24], [2.0**-24], [2.0**-23], [1.0], [-2.0]])
    out = torch.empty(1)
    backend.tree_sum(out, [a, b, c])
    assert torch.equal(out, (a + b) + c)
    backend.tree_sum(out, [a, b, c, d, e, f])
    assert torch.equal(out, ((a + b) + (c + d)) + (e + f))


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 4, 5, 8, 9])
def test_out_may_be_any_piece(backend, num_pieces):
    pieces = list(torch.randn(num_pieces, 2500))
    expected = by_counter(pieces)
    for i in range(num_pieces):
        mine = [piece.clone() for piece in pieces]
        backend.tree_sum(mine[i], mine)
        assert torch.equal(mine[i], expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_low_precision_out_is_rounded_once(backend, dtype):
    pieces = list(torch.randn(6, 500).to(dtype))
    out = torch.empty(500, dtype=dtype)
    backend.tree_sum(out, pieces)
    assert torch.equal(out, by_counter(pieces).to(dtype))


def test_block_buffers_do_not_leak_between_blocks(backend):
    pieces = list(torch.randn(5, 5000))
    out = torch.empty(5000)
    backend.tree_sum(out, pieces)
    assert torch.equal(out, by_counter(pieces))


@pytest.mark.parametrize("dtype", FLOATS)
def test_chunk_sumsq_is_accurate(backend, dtype):
    x = torch.randn(4096 * 3).to(dtype)
    sums = backend.chunk_sumsq(x, 4096)
    exact = torch.stack([chunk.double().square().sum() for chunk in x.view(3, 4096)])
    # 12 levels of additions of positive numbers, each with relative error 2**-53; as many in torch's own sum.
    assert ((sums - exact).abs() <= 2 * 12 * 2**-53 * exact).all()


@given(blocks=st.integers(1, 40), pairs=st.integers(0, 5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_double_chunk_is_the_sum_of_two(backend, blocks, pairs):
    x = torch.randn(64 * blocks * 2 * pairs) * 1e3
    single = backend.chunk_sumsq(x, 64 * blocks)
    double = backend.chunk_sumsq(x, 128 * blocks)
    assert torch.equal(double, single[::2] + single[1::2])


def test_chunk_sumsq_keeps_what_float32_loses(backend):
    x = torch.zeros(128)
    x[0], x[64] = 1e19, 1e-19
    assert torch.equal(backend.chunk_sumsq(x, 64), x[[0, 64]].double().square())
