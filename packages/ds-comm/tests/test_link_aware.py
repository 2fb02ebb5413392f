"""Codes chosen in training: all ranks the same, by measured links, with errors kept, and reported."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch
from ds_comm import LinkCost
from ds_comm.config import AutoConfig, CompressionConfig
from ds_comm.link_aware import LinkAwareCompression
from ds_testkit import Rank, RankPool
from torch import Tensor

from .codec_table import numbers
from .messages import Messages

pytestmark = pytest.mark.rung_c

NUMELS = (64, 2000, 300)  # of a slice
ROUNDS = 9


class Outcome(NamedTuple):
    report: dict[str, Any]
    codes: tuple[str, ...]
    messages: list[str]
    sent: list[int]  # after each round
    arrived: list[Tensor]  # sums over rounds
    owed: dict[int, Tensor]


def reduced(rank: Rank, auto: dict[str, Any], bandwidth: float | None) -> Outcome:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_comm")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    costs = () if bandwidth is None else (LinkCost(latency=0.0, bandwidth=bandwidth),)
    compression = LinkAwareCompression(CompressionConfig(auto=AutoConfig(**auto), block=64), costs=costs)
    comm = compression.around(Messages(rank))
    arrived = [torch.zeros(numel, dtype=torch.float64) for numel in NUMELS]
    sent = []
    for turn in range(ROUNDS):
        assert (compression.report is None) == (turn < 6), turn
        handles = []
        for key, numel in enumerate(NUMELS):
            full, out = numbers(numel * rank.size, seed=100 * turn + rank.rank), torch.empty(numel)
            handles.append((key, out, comm.reduce_scatter(out, full, key=key)))
        for key, out, handle in handles:
            handle.wait()
            arrived[key] += out.double()
        sent.append(comm.accounts["reduce_scatter"].wire.sent)
    logger.removeHandler(handler)
    report = compression.report
    assert report is not None
    return Outcome(asdict(report), report.plan.codes, messages, sent, arrived, comm.state())


@pytest.mark.parametrize(
    ("auto", "bandwidth", "codes"),
    [
        ({"step_seconds": 60.0, "compute_seconds": 0.1}, 1e9, {"exact"}),
        ({"step_seconds": 1e-9, "compute_seconds": 0.1, "max_error": 1.0}, 1e2, {"ternary"}),
        ({"step_seconds": 1e-9, "compute_seconds": 0.1, "max_error": 0.05}, 1e2, {"int4", "ternary"}),
        ({}, 1e5, None),
        ({}, None, None),
    ],
)
def test_all_ranks_choose_alike_by_the_time_there_is(
    ranks: RankPool, auto: dict[str, Any], bandwidth: float | None, codes: set[str] | None
) -> None:
    first, *others = ranks.run(reduced, auto, bandwidth, size=2)
    for other in others:
        assert other.report == first.report
        assert not other.messages, "rank 0 tells"
    assert codes is None or set(first.codes) <= codes
    for bucket, code in zip(first.report["buckets"], first.codes, strict=True):
        assert code == "exact" or bucket["lost"][code] <= auto.get("max_error", 0.5) * bucket["squares"]
    message, *warnings = first.messages
    assert "buffers of gradients: " in message
    assert "MB for a micro-batch and saves" in message
    assert bool(warnings) != first.report["plan"]["met"]
    for outcome in (first, *others):
        exact, last = outcome.sent[0], outcome.sent[-1] - outcome.sent[-2]
        assert exact == first.report["plan"]["exact_nbytes"]
        assert last == first.report["plan"]["nbytes"]


def test_what_arrived_and_what_is_owed_are_what_was_meant(ranks: RankPool) -> None:
    auto = {"step_seconds": 1e-9, "compute_seconds": 0.1, "max_error": 1.0}
    outcomes = ranks.run(reduced, auto, 1e2, size=2)
    for key, numel in enumerate(NUMELS):
        given = [numbers(2 * numel, seed=100 * turn + peer).double() for turn in range(ROUNDS) for peer in range(2)]
        meant, size = (torch.stack([kind(each) for each in given]).sum(0) for kind in (torch.clone, torch.abs))
        got = torch.cat([each.arrived[key] + each.owed[key].double() for each in outcomes])
        assert torch.cat([each.owed[key] for each in outcomes]).norm() > 0.1
        # every round rounds sums over two ranks, of gradients and of what was kept of those before
        assert (got - meant).abs().max() <= ROUNDS * 8 * 2**-24 * size.max()


def owing(rank: Rank) -> None:
    """Errors of a checkpoint are paid before a code is chosen, and after."""
    compression = LinkAwareCompression(CompressionConfig(auto=AutoConfig(step_seconds=60.0)))
    comm = compression.around(Messages(rank))
    for turn in range(8):
        if turn in (0, 7):
            comm.load_state({3: torch.full((10,), 1.0 + rank.rank)})
            assert comm.state()[3].tolist() == [1.0 + rank.rank] * 10
        out = torch.empty(10)
        comm.reduce_scatter(out, torch.ones(10 * rank.size), key=3).wait()
        assert out.tolist() == [rank.size + (1.0 + rank.rank) * (turn in (0, 7))] * 10
        assert not comm.state()
    assert compression.report is not None


def test_owed_gradients_are_paid_exactly_while_nothing_is_chosen(ranks: RankPool) -> None:
    ranks.run(owing, size=2)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"step_seconds must be positive and finite, or null; got 0\.0"):
        AutoConfig(step_seconds=0.0)
    with pytest.raises(ValueError, match=r"max_error must be within 0 \.\.\. 1, a part of the squares; got 1\.5"):
        AutoConfig(max_error=1.5)
    with pytest.raises(ValueError, match="auto chooses codes of gradients, but gradients = 'int4'; keep one"):
        CompressionConfig(auto=AutoConfig(), gradients="int4")


class Stages(NamedTuple):
    names: list[str]
    codes: tuple[str, ...]
    squares: list[float]
    trained_exactly: int  # micro-batches of the stage that is behind


def in_stages(rank: Rank) -> Stages:
    """Two stages of a pipeline on each rank, of which one is two micro-batches ahead."""
    auto = AutoConfig(step_seconds=1e-9, compute_seconds=0.1, max_error=1.0)
    cost = LinkCost(latency=0.0, bandwidth=1e2)
    compression = LinkAwareCompression(CompressionConfig(auto=auto, block=64), accumulation=4, costs=(cost, cost))
    ahead, behind = (compression.around(Messages(rank)) for _ in range(2))
    exact = 0
    for turn in range(7):
        for comm in (ahead, ahead, behind, behind):
            for key, numel in enumerate(NUMELS):
                full = numbers(numel * rank.size, seed=100 * turn + rank.rank)
                comm.reduce_scatter(torch.empty(numel), full, key=key).wait()
        exact += 2 * (behind.accounts["reduce_scatter"].wire == behind.accounts["reduce_scatter"].exact)
    report = compression.report
    assert report is not None
    return Stages([b.name for b in report.buckets], report.plan.codes, [b.squares for b in report.buckets], exact)


def test_every_buffer_of_several_stages_on_a_rank_is_tried_and_chosen(ranks: RankPool) -> None:
    first, other = ranks.run(in_stages, size=2)
    assert first == other
    assert first.names == [f"{level}.{key}" for level in (0, 1) for key in range(len(NUMELS))]
    assert first.codes == ("ternary",) * 6
    assert first.trained_exactly == 6  # one to warm up, four of a step, one that tries codes
    # of both stages the sixth micro-batch was that of turn 2: the same numbers
    assert first.squares[:3] == first.squares[3:]
    means = [
        sum(numbers(numel * 2, seed=200 + rank).double().square().sum().item() for rank in range(2)) / 2
        for numel in NUMELS
    ]
    assert first.squares[:3] == pytest.approx(means, rel=1e-5)
