"""Collectives that send codes: values, agreement, bytes, error feedback, what happens when a code loses too much."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ds_comm import CompressedCollectives
from ds_comm.codecs import BlockCodec, CastCodec
from ds_comm.config import CompressionConfig
from ds_testkit import Rank, RankPool
from torch import Tensor

from .codec_table import CODECS, numbers
from .messages import Messages

pytestmark = pytest.mark.rung_c

INT4 = BlockCodec(code="int4", block=64)
SIGN = BlockCodec(code="sign", block=64)
NUMELS = (0, 1, 64, 200)  # of a slice; the last one ends within a block


def decoded(codec: Any, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), torch.empty(x.numel()))


def reduced(rank: Rank, name: str, dtype: torch.dtype) -> None:
    codec = CODECS[name]
    comm = CompressedCollectives(Messages(rank), gradients=codec, error_feedback=False)
    waiting = []
    for key, numel in enumerate(NUMELS):
        fulls = [numbers(numel * rank.size, dtype, seed=peer) for peer in range(rank.size)]
        slices = [full.view(rank.size, -1)[rank.rank] for full in fulls]
        expected = slices[rank.rank].float()
        for peer, piece in enumerate(slices):
            if peer != rank.rank:
                expected = expected + decoded(codec, piece)
        full = fulls[rank.rank]
        # as ds-zero does: the sum may stand where this rank's slice stood
        out = full.view(rank.size, -1)[rank.rank] if dtype == torch.float32 else torch.empty(numel)
        waiting.append((comm.reduce_scatter(out, full, key=key), out, expected, full))
    for handle, out, expected, _ in waiting[:: 1 if rank.rank % 2 else -1]:
        handle.wait()
        assert torch.equal(out, expected)
    account = comm.accounts["reduce_scatter"]
    assert account.wire.sent == (rank.size - 1) * sum(codec.payload_bytes(numel) + 1 for numel in NUMELS)
    assert account.wire.received == account.wire.sent
    assert account.exact.sent == (rank.size - 1) * sum(NUMELS) * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4", "ternary", "hadamard int4", "top 3 of 100", "fp8"])
def test_a_reduction_adds_what_was_decoded_in_the_order_of_ranks(ranks: RankPool, name: str, dtype) -> None:
    for size in (2, 4):
        ranks.run(reduced, name, dtype, size=size)


def gathered(rank: Rank, name: str, dtype: torch.dtype) -> list[Tensor]:
    codec = CODECS[name]
    comm = CompressedCollectives(Messages(rank), weights=codec)
    waiting, found = [], []
    for key, numel in enumerate(NUMELS):
        whole = torch.empty(rank.size * numel, dtype=dtype)
        shard = numbers(numel, dtype, seed=rank.rank)
        waiting.append((comm.all_gather(whole, shard, key=key), whole, shard))
    for (handle, whole, shard), numel in zip(waiting, NUMELS):
        handle.wait()
        expected = [decoded(codec, numbers(numel, dtype, seed=peer)) for peer in range(rank.size)]
        assert torch.equal(whole, torch.cat(expected).to(dtype))
        assert torch.equal(shard, numbers(numel, dtype, seed=rank.rank)), "what was coded stays as it is"
        found.append(whole)
    assert comm.accounts["all_gather"].wire.sent == (rank.size - 1) * sum(map(codec.payload_bytes, NUMELS))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_all_ranks_decode_the_same_weights(ranks: RankPool, name: str, dtype) -> None:
    first, *others = ranks.run(gathered, name, dtype)
    for other in others:
        assert all(map(torch.equal, other, first))


# Error feedback #

NUMEL = 400


def gradient(step: int, rank: int, num_slices: int) -> Tensor:
    """A rank's gradient of one step: on 2 ranks the sum over 4 of them, in pairs."""
    per = 4 // num_slices
    return sum((numbers(NUMEL, seed=10 * step + per * rank + each) for each in range(per)), torch.zeros(NUMEL))


def sent_in(rank: Rank, steps: range, saved: list[dict[int, Tensor]]) -> tuple[Tensor, dict[int, Tensor]]:
    """Reduce in each step; return the sum of what arrived in this rank's slice, and the errors."""
    comm = CompressedCollectives(Messages(rank), gradients=SIGN)
    if saved:
        whole = torch.cat([each[5] for each in saved])
        comm.load_state({5: whole.view(rank.size, -1)[rank.rank].clone()})
        state = comm.state()[5]
        assert torch.equal(state, whole.view(rank.size, -1)[rank.rank])
    total = torch.zeros(NUMEL // rank.size, dtype=torch.float64)
    for step in steps:
        out = torch.empty(NUMEL // rank.size)
        comm.reduce_scatter(out, gradient(step, rank.rank, rank.size), key=5).wait()
        total += out.double()
    return total, comm.state()


def test_what_arrived_and_the_errors_are_what_was_meant_also_on_fewer_ranks(ranks: RankPool) -> None:
    before = ranks.run(sent_in, range(6), [], size=4)
    after = ranks.run(sent_in, range(6, 12), [state for _, state in before], size=2)
    arrived = torch.cat([total for total, _ in before]) + torch.cat([total for total, _ in after])
    errors = torch.cat([state[5] for _, state in after])
    exact = [numbers(NUMEL, seed=10 * step + rank).double() for step in range(12) for rank in range(4)]
    size = sum((each.abs() for each in exact), torch.zeros(NUMEL, dtype=torch.float64))
    assert errors.norm() > 0.1, "there is something to remember"
    # each of 12 steps rounds sums over at most 4 ranks, of gradients and of what was kept of those before
    assert ((arrived + errors - sum(exact)).abs() <= 12 * 8 * 2**-24 * size.max() * 4).all()


def averaged(rank: Rank, beta: float, reset: int | None) -> None:
    """The errors follow their equation, worked out here for all ranks."""
    size, numel = rank.size, 100
    comm = CompressedCollectives(Messages(rank), gradients=SIGN, error_beta=beta, error_reset=reset)
    errors = torch.zeros(size, size, numel)  # of each rank, for each slice
    for step in range(7):
        if reset is not None and step % reset == 0:
            errors.zero_()
        out, fulls = torch.empty(numel), [gradient(step, peer, size).view(size, -1)[:, :numel] for peer in range(size)]
        comm.reduce_scatter(out, fulls[rank.rank].reshape(-1), key=3).wait()
        expected = fulls[rank.rank][rank.rank].clone()
        for peer in range(size):
            for part in range(size):
                if part == peer:
                    continue
                meant = fulls[peer][part] + errors[peer, part]
                sent = decoded(SIGN, meant)
                errors[peer, part] = beta * errors[peer, part] + (1 - beta) * (meant - sent)
                if part == rank.rank:
                    expected += sent
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    summed = comm.state()[3]
    torch.testing.assert_close(summed, errors[:, rank.rank].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("beta", "reset"), [(0.0, None), (0.8, None), (0.8, 3), (0.0, 2)])
def test_errors_are_averaged_and_dropped_now_and_then(ranks: RankPool, beta: float, reset: int | None) -> None:
    ranks.run(averaged, beta, reset, size=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradients": "int4", "error_beta": 1.0}, "error_beta must be at least 0 and below 1; got 1.0"),
        ({"gradients": "int4", "error_reset": 0}, "error_reset must be at least 1, or null; got 0"),
        ({"weights": "int4", "error_beta": 0.5}, r"error_beta = 0.5, error_reset = None are about .* gradients = None"),
        ({"gradients": "int4", "error_reset": 5, "error_feedback": False}, "error_feedback = False; set both"),
    ],
)
def test_settings_of_errors_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**settings)


def not_finite(rank: Rank) -> None:
    comm = CompressedCollectives(Messages(rank), gradients=INT4)
    out = torch.empty(100)
    bad = numbers(100 * rank.size, seed=rank.rank)
    if rank.rank == 0:
        bad[150] = torch.inf
    comm.reduce_scatter(out, bad, key=0).wait()
    assert bool(out.isfinite().all()) == (rank.rank != 1)
    comm.reduce_scatter(out, numbers(100 * rank.size), key=0).wait()
    assert out.isfinite().all()


def test_what_is_not_finite_arrives_and_is_forgotten(ranks: RankPool) -> None:
    ranks.run(not_finite, size=2)


def lossy(rank: Rank) -> tuple[list[str], int]:
    """Only rank 0's gradient is such that the code loses all of it."""
    comm = CompressedCollectives(Messages(rank), gradients=BlockCodec(code="sign", block=1024, scale="rms"))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_comm.coded")
    logger.addHandler(handler)
    for _ in range(2):
        fulls = [torch.zeros(1024 * rank.size) for _ in range(rank.size)]
        for peer, full in enumerate(fulls):
            full[:: 64 if peer == 0 else 1] = 1.0 + peer
        out = torch.empty(1024)
        comm.reduce_scatter(out, fulls[rank.rank], key=3).wait()
        expected = sum((full.view(rank.size, -1)[rank.rank] for full in fulls), torch.zeros(1024))
        assert torch.allclose(out, expected, rtol=0, atol=1e-6)
    logger.removeHandler(handler)
    assert all(errors.abs().max() <= 1e-6 for errors in comm.state().values())
    return messages, comm.accounts["reduce_scatter"].wire.sent


def test_where_a_code_loses_all_there_is_exact_numbers_follow_and_that_is_said_once(ranks: RankPool) -> None:
    found = ranks.run(lossy, size=2)
    for messages, _ in found:
        (message,) = messages
        assert "buffer 3 on ranks 0 (contraction factor 1 or more)" in message
    coded = BlockCodec(code="sign", block=1024).payload_bytes(1024) + 1
    assert [sent for _, sent in found] == [2 * (coded + 4096), 2 * coded]


# Differences of weights #


def followed(rank: Rank, dtype: torch.dtype) -> list[Tensor]:
    comm = CompressedCollectives(Messages(rank), weights=INT4, differences=True)
    shard = numbers(150, dtype, seed=rank.rank)
    found = []
    for step in range(5):
        whole = torch.empty(150 * rank.size, dtype=dtype)
        comm.all_gather(whole, shard, key=0).wait()
        own = whole.view(rank.size, -1)[rank.rank]
        if step == 0:
            assert torch.equal(own, shard), "the first one is exact"
        else:
            # a fourteenth of the largest change, and one rounding
            bound = 0.01 / 14 * (1 + 1 / 14) + torch.finfo(dtype).eps * shard.float().abs()
            assert ((own.float() - shard.float()).abs() <= bound * 1.01).all()
        found.append(whole)
        shard = (shard.float() + 0.01 * torch.linspace(-1, 1, 150)).to(dtype)
    account = comm.accounts["all_gather"]
    assert account.wire.sent == (rank.size - 1) * (150 * dtype.itemsize + 4 * INT4.payload_bytes(150))
    return found


def test_differences_of_weights_follow_them_closely_and_alike_on_all_ranks(ranks: RankPool) -> None:
    first, *others = ranks.run(followed, torch.float32, size=4)
    for other in others:
        assert all(map(torch.equal, other, first))


# What is not coded #


def passed_through(rank: Rank) -> None:
    comm = CompressedCollectives(Messages(rank), weights=INT4, gradients=INT4)
    whole = torch.empty(3 * rank.size, dtype=torch.int64)
    comm.all_gather(whole, torch.full((3,), 10**9 + rank.rank), key=0).wait()
    assert whole.view(rank.size, 3)[:, 0].tolist() == [10**9 + peer for peer in range(rank.size)]
    bare = CompressedCollectives(Messages(rank))
    out = torch.empty(3)
    bare.reduce_scatter(out, torch.full((3 * rank.size,), 1.1), key=0).wait()
    assert torch.allclose(out, torch.full((3,), 1.1 * rank.size))
    assert bare.accounts["reduce_scatter"].wire == bare.accounts["reduce_scatter"].exact
    assert bare.state() == {}
    with pytest.raises(ValueError, match="got errors of 1 buffers, but gradients are sent exactly here, on 2 ranks"):
        bare.load_state({0: torch.zeros(3)})


def test_other_types_and_calls_are_exact(ranks: RankPool) -> None:
    ranks.run(passed_through, size=2)


def cast(rank: Rank) -> int:
    comm = CompressedCollectives(Messages(rank), gradients=CastCodec(dtype=torch.float32))
    full, out = numbers(100 * rank.size, seed=rank.rank), torch.empty(100)
    comm.reduce_scatter(out, full, key=0).wait()
    slices = [numbers(100 * rank.size, seed=peer).view(rank.size, -1)[rank.rank] for peer in range(rank.size)]
    assert torch.equal(out, slices[0] + slices[1])
    return comm.accounts["reduce_scatter"].wire.calls


def test_float32_is_exact(ranks: RankPool) -> None:
    assert ranks.run(cast, size=2) == [1, 1]
