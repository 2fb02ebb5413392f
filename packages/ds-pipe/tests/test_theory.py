"""Simulated bubbles and exact memory against the formulas of the papers."""

from __future__ import annotations

import pytest
from ds_pipe import Costs, make_greedy_schedule, make_schedule, peak_bytes, simulate

RANKS = [2, 4, 8, 16]
FORWARD, INPUT_GRAD, WEIGHT_GRAD = 3.0, 4.0, 2.0  # of all stages of one rank


def costs(num_ranks: int, num_chunks: int, times: tuple[float, float, float]) -> Costs:
    """Times of a rank, in equal parts over its stages; one micro-batch of all stages of a rank is one byte."""
    num_stages = num_ranks * num_chunks
    forward, input_grad, weight_grad = (num_stages * (time / num_chunks,) for time in times)
    return Costs(
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        kept_bytes=num_stages * (1 / num_chunks,),
        message_bytes=num_stages * (0.0,),
    )


def bubble(
    name: str, num_ranks: int, num_micro_batches: int, num_chunks: int, times: tuple[float, float, float]
) -> float:
    """Time that the last rank to finish has not worked."""
    chunks = num_chunks if num_chunks > 1 else None
    schedule = make_schedule(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_chunks=chunks)
    return simulate(schedule, costs(num_ranks, num_chunks, times)).seconds - num_micro_batches * sum(times)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "num_chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("looped_bfs", 2), ("looped_bfs", 3)],
)
def test_bubbles_of_whole_backwards(name: str, num_chunks: int, num_ranks: int, factor: int) -> None:
    if (name, num_ranks, factor) == ("interleaved", 16, 8):
        factor = 4  # says the same in half the time
    times = (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
    want = (num_ranks - 1) * sum(times) / num_chunks
    assert bubble(name, num_ranks, factor * num_ranks, num_chunks, times) == pytest.approx(want)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_bubble_of_zb_h1(num_ranks: int, factor: int) -> None:
    times = (1.0, 1.0, 1.0)
    assert bubble("zb_h1", num_ranks, factor * num_ranks, 1, times) == pytest.approx(num_ranks - 1)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("factor", [2, 8])
def test_no_rank_waits_in_zb_v(num_ranks: int, factor: int) -> None:
    schedule = make_schedule("zb_v", num_ranks=num_ranks, num_micro_batches=factor * num_ranks)
    timeline = simulate(schedule, costs(num_ranks, 2, (1.0, 1.0, 1.0)))
    assert max(timeline.idle) == pytest.approx(0.0)
    assert timeline.seconds - 3 * factor * num_ranks == pytest.approx((num_ranks - 1) / 2)


# computed with the schedules of another library, F = I = W = 1
SHARES = {
    (4, 8): {"gpipe": 27.3, "1f1b": 27.3, "zb_h1": 11.1, "interleaved": 15.8, "zb_v": 5.9},
    (8, 16): {"gpipe": 30.4, "1f1b": 30.4, "zb_h1": 12.7, "interleaved": 17.9, "zb_v": 6.8},
    (8, 64): {"gpipe": 9.9, "1f1b": 9.9, "zb_h1": 3.5, "interleaved": 5.2, "zb_v": 1.8},
}


@pytest.mark.parametrize("size", SHARES)
def test_shares_that_others_found(size: tuple[int, int]) -> None:
    num_ranks, num_micro_batches = size
    for name, want in SHARES[size].items():
        schedule = make_schedule(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
        num_chunks = schedule.num_stages // num_ranks
        timeline = simulate(schedule, costs(num_ranks, num_chunks, (1.0, 1.0, 1.0)))
        assert 100 * timeline.bubble_share == pytest.approx(want, abs=0.06), name


@pytest.mark.parametrize(
    ("name", "num_chunks", "want"),
    [
        ("gpipe", 1, 16.0),
        ("1f1b", 1, 8.0),
        ("zb_h1", 1, 8.0),
        ("zb_v", 2, 8.0),
        ("interleaved", 2, 11.5),
        ("interleaved", 4, 9.75),
        ("looped_bfs", 2, 16.0),
    ],
)
def test_peaks_of_kept_activations(name: str, num_chunks: int, want: float) -> None:
    chunks = num_chunks if num_chunks > 1 else None
    schedule = make_schedule(name, num_ranks=8, num_micro_batches=16, num_chunks=chunks)
    assert max(peak_bytes(schedule, costs(8, num_chunks, (1.0, 1.0, 1.0)))) == pytest.approx(want)


def test_messages_take_time() -> None:
    """Two stages, one micro-batch: there and back again."""
    schedule = make_schedule("gpipe", num_ranks=2, num_micro_batches=1)
    slow = Costs(
        forward=(1.0, 1.0),
        input_grad=(1.0, 1.0),
        weight_grad=(1.0, 1.0),
        kept_bytes=(0.0, 0.0),
        message_bytes=(0.0, 10.0),
        latency=0.5,
        bytes_per_second=20.0,
    )
    assert simulate(schedule, slow).seconds == pytest.approx(6.0 + 2 * (0.5 + 10.0 / 20.0))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("factor", [1, 2])
def test_greedy_is_as_good_as_zb_h1_where_stages_are_equal(num_ranks: int, factor: int) -> None:
    even = costs(num_ranks, 1, (1.0, 1.0, 1.0))
    schedule = make_greedy_schedule(even, num_ranks=num_ranks, num_micro_batches=factor * num_ranks)
    found = simulate(schedule, even).seconds - 3.0 * factor * num_ranks
    assert found == pytest.approx(num_ranks - 1)
    assert max(peak_bytes(schedule, even)) <= num_ranks


def test_greedy_beats_fixed_schedules_where_stages_are_not_equal() -> None:
    """The first stage of eight takes twice as long, as an embedding does; two stages on each of four ranks, in a V."""
    each = (1.0, *(7 * (0.5,)))
    uneven = Costs(forward=each, input_grad=each, weight_grad=each, kept_bytes=8 * (0.5,), message_bytes=8 * (0.0,))
    vee = (0, 1, 2, 3, 3, 2, 1, 0)
    ours = simulate(make_greedy_schedule(uneven, num_ranks=4, num_micro_batches=8, placement=vee), uneven).seconds
    for name in ("interleaved", "looped_bfs", "zb_v"):
        fixed = make_schedule(name, num_ranks=4, num_micro_batches=8, costs=uneven)
        assert ours <= simulate(fixed, uneven).seconds, name
