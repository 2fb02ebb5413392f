"""Latency and bandwidth of links: the line through times, and what is measured between processes."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
from ds_comm import LinkCost, Links, probe
from ds_comm.commands import main
from ds_comm.links import Sample, fit, measure
from ds_testkit import Rank, RankPool, slow_link
from hypothesis import given
from hypothesis import strategies as st

SIZES = [1 << power for power in range(6, 25, 2)]


@given(st.floats(1e-6, 1e-1), st.floats(1e5, 1e11), st.sampled_from(SIZES), st.floats(0.01, 100.0))
def test_a_line_is_found_whatever_one_sample_says(
    latency: float, bandwidth: float, spoiled: int, factor: float
) -> None:
    wanted = LinkCost(latency=latency, bandwidth=bandwidth)
    samples = [Sample(size, wanted.seconds(size)) for size in SIZES]
    clean = fit(samples)
    # differences of times round by a part of the latency
    rounding = 2**-50 * latency
    assert clean.seconds(SIZES[-1]) == pytest.approx(wanted.seconds(SIZES[-1]), rel=1e-9)
    assert 1 / clean.bandwidth == pytest.approx(1 / bandwidth, rel=1e-6, abs=rounding)
    if spoiled < SIZES[-2]:  # between the largest two lies most of the weight
        wrong = [each._replace(seconds=each.seconds * factor) if each.nbytes == spoiled else each for each in samples]
        assert 1 / fit(wrong).bandwidth == pytest.approx(1 / bandwidth, rel=1e-6, abs=rounding)


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.floats(0, 10)), min_size=1, max_size=8))
def test_whatever_was_measured_gives_a_cost(times: list[tuple[int, float]]) -> None:
    samples = [Sample(*each) for each in times]
    if len({each.nbytes for each in samples}) == 1:
        with pytest.raises(ValueError, match="at least two sizes"):
            fit(samples)
    else:
        cost = fit(samples)
        assert cost.latency >= 0
        assert cost.bandwidth > 0


def test_bounds_of_a_cost() -> None:
    with pytest.raises(ValueError, match="latency must be finite and not negative, in seconds; got inf"):
        LinkCost(latency=math.inf, bandwidth=1.0)
    with pytest.raises(ValueError, match=r"bandwidth must be positive, in bytes per second; got 0\.0"):
        LinkCost(latency=0.0, bandwidth=0.0)


def test_sizes_grow_until_a_call_takes_too_long() -> None:
    sizes: list[int] = []
    samples = measure(sizes.append, lambda seconds: seconds and len(set(sizes)), limit=2.5, rounds=3)
    assert [each.nbytes for each in samples] == [64, 256, 1024]
    assert [each.seconds for each in samples] == [1, 2, 3]
    assert sizes == [size for size in (64, 256, 1024) for _ in range(5)], "two calls to settle, then three rounds"


def probed(rank: Rank, node_size: int | None) -> Links:
    return probe(rank.group, node_size=node_size, limit=0.0, rounds=1)


@pytest.mark.rung_c
@pytest.mark.parametrize(
    ("size", "node_size", "axes"),
    [
        (4, 2, [("within nodes", 2), ("across nodes", 2)]),
        (3, 1, [("across nodes", 3)]),
        (2, None, [("within nodes", 2)]),  # one host
        (1, None, []),
    ],
)
def test_each_axis_is_measured_and_all_ranks_agree(
    ranks: RankPool, size: int, node_size: int | None, axes: list[tuple[str, int]]
) -> None:
    first, *others = ranks.run(probed, node_size, size=size)
    assert [(axis.name, axis.ranks) for axis in first.axes] == axes
    assert all(other == first for other in others)
    for axis in first.axes:
        assert len(axis.samples) == 2
        assert all(sample.seconds > 0 for sample in axis.samples)


def refused(rank: Rank) -> None:
    with pytest.raises(ValueError, match="2 ranks are not a whole number of nodes of node_size = 3"):
        probe(rank.group, node_size=3)


@pytest.mark.rung_c
def test_nodes_are_whole(ranks: RankPool) -> None:
    ranks.run(refused, size=2)


def test_the_rate_of_a_slow_link_is_measured() -> None:
    reason = slow_link.unusable()
    if reason is not None:
        pytest.skip(reason)
    program = (
        "import json, sys, torch.distributed as dist; from ds_comm import probe; dist.init_process_group('gloo'); "
        "axis, = probe(node_size=1, limit=0.2, rounds=3).axes; "
        "print(json.dumps([axis.message.bandwidth, axis.exchange.bandwidth]))"
    )
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    with slow_link.SlowLink("100mbit") as link:
        first, second = link.run([sys.executable, "-W", "ignore", "-c", program], env)
    assert first == second
    for bandwidth in first:
        # 12.5 MB/s with headers; a machine that is busy with other things is slower
        assert 6e6 <= bandwidth <= 13e6, json.dumps(first)


def test_the_command_measures_on_this_host(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    main(["probe", "--ranks", "2", "--limit", "0.0", "--rounds", "1"])
    assert "| within nodes | 2 | " in capfd.readouterr().out
