"""The compressed all-reduce: its equations, its error feedback, bytes, resizing, values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from ds_comm import all_reduce
from ds_comm.all_reduce import CompressedAllReduce, is_finite, mean_exactly
from ds_comm.codecs import E8Codec
from ds_comm.traffic import Traffic
from ds_testkit import Rank, RankPool
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .codes import SignCodec

BLOCK = 8


def values(rank: int, step: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * step + rank))


class Call(NamedTuple):
    out: Tensor
    worker: Tensor
    residual: Tensor
    traffic: Traffic


def reduce_steps(rank: Rank, numel: int, steps: int, loaded: Tensor | None = None, chunk: int = 1 << 20) -> list[Call]:
    reducer = CompressedAllReduce(numel, SignCodec(BLOCK), group=rank.group, chunk=chunk)
    if loaded is not None:
        reducer.load_residual(loaded)
    calls = []
    for step in range(steps):
        x = values(rank.rank, step, numel)
        before, out = x.clone(), torch.full_like(x, float("nan"))
        assert reducer.reduce(x, out)
        assert torch.equal(x, before)
        counted = Traffic(reducer.traffic.sent, reducer.traffic.received, reducer.traffic.calls)
        calls.append(Call(out, reducer.worker_error.clone(), reducer.residual(), counted))
    return calls


def coded(x: Tensor) -> Tensor:
    """Float64: signs with the mean magnitude of each block."""
    return torch.cat([(part >= 0).double().mul(2).sub(1) * part.abs().mean() for part in x.split(BLOCK)])


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("numel", "chunk"), [(0, 9), (1, 1), (7, 9), (64, 64), (101, 101), (101, 1), (101, 40)])
def test_equals_the_equations_in_one_process(ranks: RankPool, size: int, numel: int, chunk: int) -> None:
    calls = ranks.run(reduce_steps, numel, 4, None, chunk, size=size)
    workers, server = [torch.zeros(numel, dtype=torch.float64) for _ in range(size)], torch.zeros(numel).double()
    for step in range(4):
        if size == 1:
            expected = values(0, step, numel).double()
        else:
            totals = [values(rank, step, numel).double() + workers[rank] for rank in range(size)]
            sent = [coded(total) for total in totals]
            workers = [total - code for total, code in zip(totals, sent, strict=True)]
            mean = torch.stack(sent).mean(0) + server
            # slices begin at multiples of the block: the whole has the codes of its slices
            expected = coded(mean)
            server = mean - expected
        for rank in range(size):
            torch.testing.assert_close(calls[rank][step].out.double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(calls[rank][step].worker.double(), workers[rank], rtol=1e-5, atol=1e-6)
            assert torch.equal(calls[rank][step].out, calls[0][step].out)
            residual = torch.stack(workers).mean(0) + server
            torch.testing.assert_close(calls[rank][step].residual.double(), residual, rtol=1e-5, atol=1e-6)


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [2, 3])
def test_the_bits_are_the_same_whatever_the_chunks(ranks: RankPool, size: int) -> None:
    whole, cut = (ranks.run(reduce_steps, 333, 3, None, chunk, size=size) for chunk in (333, 50))
    for rank in range(size):
        for one, other in zip(whole[rank], cut[rank], strict=True):
            assert torch.equal(one.out, other.out)
            assert torch.equal(one.worker, other.worker)
    assert cut[0][-1].traffic.calls > whole[0][-1].traffic.calls


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_was_sent_and_the_residual_are_what_should_have_been_sent(ranks: RankPool, size: int) -> None:
    numel, steps = 333, 12
    calls = ranks.run(reduce_steps, numel, steps, size=size)
    sent = sum(call.out.double() for call in calls[0])
    true = sum(values(rank, step, numel).double() for rank in range(size) for step in range(steps)) / size
    torch.testing.assert_close(sent + calls[0][-1].residual.double(), true, rtol=0, atol=2e-5)
    assert torch.equal(calls[0][-1].residual, calls[1][-1].residual)
    assert calls[0][-1].residual.norm() > 1  # there is something that only the residual explains


@pytest.mark.rung_c
def test_four_ranks_state_goes_on_two_and_one(ranks: RankPool) -> None:
    numel = 333
    first = ranks.run(reduce_steps, numel, 5)
    residual = first[0][-1].residual
    done = sum(call.out.double() for call in first[0]) + residual.double()
    for size in (2, 1):
        then = ranks.run(reduce_steps, numel, 5, residual, size=size)
        new = sum(values(rank, step, numel).double() for rank in range(size) for step in range(5)) / size
        sent = sum(call.out.double() for call in (*first[0], *then[0]))
        torch.testing.assert_close(sent + then[0][-1].residual.double(), done + new, rtol=0, atol=2e-5)
    assert not then[0][-1].residual.any()  # alone, all of it was delivered


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_two_payloads_less_what_stays(ranks: RankPool, size: int) -> None:
    numel = size * BLOCK * 20
    last = ranks.run(reduce_steps, numel, 3, size=size)[0][-1].traffic
    exact = 3 * 2 * (size - 1) * SignCodec(BLOCK).payload_bytes(numel // size)
    assert last.calls == 6
    assert last.sent == last.received
    assert exact < last.sent <= exact + last.calls * (size - 1) * 16  # a flag, and padding to 16 bytes


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 63, 64, 65, 128, 512, 1000, 4096])
@pytest.mark.parametrize("more", [0, 1, 513, 1 << 16, 12345])
def test_one_bit_takes_at_most_a_quarter_byte_and_its_scales_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, size: int, more: int
) -> None:
    monkeypatch.setattr(all_reduce, "place_in", lambda group: (size - 1, size))
    numel = size * ((1 << 16) + more) + more % 7
    reducer = CompressedAllReduce(numel, E8Codec(), device=torch.device("meta"))
    parts = [part for chunk in reducer._chunks for part in chunk.slices]
    assert [part.stop for part in parts] == [*(part.start for part in parts[1:]), numel]
    for chunk in reducer._chunks * 2:
        reducer._count(chunk)
    each_way = reducer.traffic.sent / numel
    exact = 2 * (size - 1) / size * E8Codec().payload_bytes(1 << 20) / (1 << 20)
    assert exact <= each_way <= min(0.27, 1.02 * exact)


def reduce_with_a_bad_rank(rank: Rank, bad: float, chunk: int) -> tuple[list[bool], list[Tensor], list[Tensor]]:
    reducer = CompressedAllReduce(100, SignCodec(BLOCK), group=rank.group, chunk=chunk)
    good, outs, errors = [], [], []
    for step in range(3):
        x = values(rank.rank, step, 100)
        if step == 1 and rank.rank == 1:
            x[77] = bad
        out = torch.full_like(x, 5.0)
        good.append(reducer.reduce(x, out))
        outs.append(out)
        errors.append(reducer.residual())
    return good, outs, errors


@pytest.mark.rung_c
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk", [20, 100])
def test_a_rank_that_is_not_finite_changes_nothing_anywhere(ranks: RankPool, bad: float, chunk: int) -> None:
    for good, outs, errors in ranks.run(reduce_with_a_bad_rank, bad, chunk, size=3):
        assert good == [True, False, True]
        assert bool((outs[1] == 5.0).all())
        torch.testing.assert_close(errors[1], errors[0], rtol=0, atol=1e-6)
        assert is_finite(outs[2])


def mean_of(rank: Rank, dtype: torch.dtype) -> tuple[Tensor, Traffic]:
    traffic, x = Traffic(), values(rank.rank, 0, 1000)
    mean_exactly(x, rank.group, dtype=dtype, traffic=traffic)
    return x, traffic


@pytest.mark.rung_c
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_exact_mean(ranks: RankPool, dtype: torch.dtype, tolerance: float) -> None:
    expected = torch.stack([values(rank, 0, 1000) for rank in range(4)]).double().mean(0)
    for x, traffic in ranks.run(mean_of, dtype):
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=tolerance)
        assert traffic == Traffic(1500 * dtype.itemsize, 1500 * dtype.itemsize, 1)


@given(st.lists(st.floats(width=32), max_size=40))
def test_is_finite(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    assert is_finite(x) == bool(x.isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CompressedAllReduce(-1, SignCodec()), "must not be negative; got -1"),
        (lambda: CompressedAllReduce(4, SignCodec(), chunk=0), "at least one element; got 0"),
        (lambda: CompressedAllReduce(4, SignCodec()).reduce(torch.zeros(5)), r"of shape \(4,\); got .*\(5,\)"),
        (lambda: CompressedAllReduce(4, SignCodec()).reduce(torch.zeros(4).double()), "got torch.float64"),
        (lambda: CompressedAllReduce(4, SignCodec()).reduce(torch.zeros(8)[::2]), r"strides \(2,\)"),
        (lambda: CompressedAllReduce(4, SignCodec()).load_residual(torch.zeros(3)), r"shape \(4,\); got \(3,\)"),
    ],
)
def test_errors_say_what_was_got(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
