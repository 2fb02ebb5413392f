"""An element's result depends on its own inputs only. See [Note: Same bits]."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import AdamHyper, ReferenceBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# More than two threads' worth, and a multiple of no vector length.
LONG = 70_001

fixtures_do_not_change = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_adam_on_every_instruction_set(cpu_isas, adam_state, grad_dtype, copy_dtype, decoupled):
    state = adam_state(1021, grad_dtype, copy_dtype)
    hyper = AdamHyper(step=2, lr=1e-3, weight_decay=0.1, decoupled=decoupled, scale=1 / 3)
    first, *others = [state.stepped(backend, hyper) for backend in cpu_isas]
    assert all(other.same_bits(first) for other in others)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_on_every_instruction_set(cpu_isas, dtype, out_dtype):
    pieces = [torch.randn(1985).to(dtype) for _ in range(7)]
    x = torch.randn(64 * 21).to(dtype)
    outs = [torch.empty(1985, dtype=out_dtype) for _ in cpu_isas]
    for backend, out in zip(cpu_isas, outs):
        backend.tree_sum(out, pieces)
    squares = [backend.chunk_sumsq(x, 64 * 7) for backend in cpu_isas]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(square, squares[0]) for square in squares)


@given(cuts=st.lists(st.integers(0, 300), max_size=4).map(sorted))
@fixtures_do_not_change
def test_adam_in_parts_is_adam_on_the_whole(backend, adam_state, hyper, cuts):
    state = adam_state(300, torch.bfloat16, torch.float16)
    whole = state.stepped(backend, hyper)
    parts = state.clone()
    for begin, end in zip([0, *cuts], [*cuts, 300]):
        # The views are unaligned: cuts are odd as often as even.
        parts.map(lambda t, begin=begin, end=end: t[begin:end]).run(backend, hyper)
    assert parts.same_bits(whole)


@given(begin=st.integers(0, 70), numel=st.integers(0, 100), num_pieces=st.integers(1, 12))
@fixtures_do_not_change
def test_tree_sum_of_a_part_is_a_part_of_the_sum(backend, begin, numel, num_pieces):
    pieces = list(torch.randn(num_pieces, 170).bfloat16())
    whole = torch.empty(170)
    backend.tree_sum(whole, pieces)
    part = torch.empty(numel + 1)[1:]
    backend.tree_sum(part, [piece[begin : begin + numel] for piece in pieces])
    assert torch.equal(part, whole[begin : begin + numel])


def test_adam_on_two_threads_is_adam_on_one(cpu, adam_state, hyper, threads):
    state = adam_state(LONG, torch.bfloat16, torch.bfloat16)
    threads(1)
    one = state.stepped(cpu, hyper)
    threads(2)
    assert state.stepped(cpu, hyper).same_bits(one)


def test_sums_on_two_threads_are_sums_on_one(cpu, threads):
    pieces = [torch.randn(LONG) for _ in range(6)]
    x = torch.randn(64 * 1100)
    threads(1)
    one = torch.empty(LONG)
    cpu.tree_sum(one, pieces)
    squares = cpu.chunk_sumsq(x, 128)
    threads(2)
    two = torch.empty(LONG)
    cpu.tree_sum(two, pieces)
    assert torch.equal(two, one)
    assert torch.equal(cpu.chunk_sumsq(x, 128), squares)


def test_flushing_subnormals_elsewhere_changes_nothing(cpu, adam_state, hyper, threads):
    # torch.set_flush_denormal holds for the calling thread only, so obeying it would tie bits to threads.
    state = adam_state(LONG)
    state.exp_avg_sq.mul_(1e-36)
    state.grad.mul_(1e-36)
    threads(2)
    kept = state.stepped(cpu, hyper)
    subnormal = kept.exp_avg_sq[kept.exp_avg_sq < torch.finfo(torch.float32).tiny]
    assert subnormal.count_nonzero() > LONG / 4
    assert torch.set_flush_denormal(True)
    try:
        flushed = state.stepped(cpu, hyper)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.same_bits(kept)


def test_the_callers_floating_point_mode_survives(cpu, adam_state, hyper):
    state = adam_state(8)
    tiny = torch.full((8,), 1e-40)
    assert torch.set_flush_denormal(True)
    try:
        state.run(cpu, hyper)
        flushed = (tiny * 1.0).count_nonzero()
    finally:
        torch.set_flush_denormal(False)
    assert flushed == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_the_references(cpu_isas, dtype):
    pieces = [torch.randn(515).to(dtype) for _ in range(11)]
    x = torch.randn(64 * 30).to(dtype)
    expected = torch.empty(515)
    ReferenceBackend().tree_sum(expected, pieces)
    for backend in cpu_isas:
        out = torch.empty(515)
        backend.tree_sum(out, pieces)
        assert torch.equal(out, expected)
        for blocks in (1, 2, 3, 5, 6, 10, 15, 30):
            squares = backend.chunk_sumsq(x, 64 * blocks)
            assert torch.equal(squares, ReferenceBackend().chunk_sumsq(x, 64 * blocks))
