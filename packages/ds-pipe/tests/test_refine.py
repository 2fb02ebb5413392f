"""Schedules made for given costs are no slower than the fixed ones, and stay within the memory."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

from ds_pipe import Costs, make_greedy_schedule, make_schedule, simulate
from ds_pipe.greedy import greedy
from ds_pipe.instruction import COMPUTE, Op
from ds_pipe.lower import lower
from ds_pipe.orders import ORDERS, Slot, loop, vee
from ds_pipe.refine import best_order, kept_peaks, refine
from ds_pipe.skips import Skip
from hypothesis import given, settings
from hypothesis import strategies as st

FIXED = {1: ("gpipe", "1f1b", "zb_h1"), 2: ("interleaved", "looped_bfs", "zb_v")}


def random_costs(seed: int, num_stages: int) -> Costs:
    chance = random.Random(seed)
    times = [tuple(chance.uniform(0.2, 2.0) for _ in range(num_stages)) for _ in range(4)]
    even = (1.0,) * num_stages
    return Costs(
        forward=times[0],
        input_grad=times[1],
        weight_grad=times[2],
        kept_bytes=even,
        backward=times[3],  # less than both halves, or more
        message_bytes=times[0],
        latency=chance.choice((0.0, 0.5, 3.0)),
        bytes_per_second=chance.choice((0.3, 2.0, float("inf"))),  # messages wait for each other, or do not
    )


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), num_ranks=st.integers(2, 3), rounds=st.integers(1, 2), chunks=st.integers(1, 2))
def test_it_is_no_slower_than_the_fixed_ones(seed: int, num_ranks: int, rounds: int, chunks: int) -> None:
    sizes = {"num_ranks": num_ranks, "num_micro_batches": rounds * num_ranks}
    costs = random_costs(seed, num_ranks * chunks)
    for name in FIXED[chunks]:
        fixed = make_schedule(name, costs=costs, **sizes)
        order = [[Slot(one.op, one.stage, one.micro_batch) for one in row if one.op in COMPUTE] for row in fixed.rows]
        memory = kept_peaks(order, fixed.placement, costs)
        ours = make_greedy_schedule(costs, placement=fixed.placement, memory=memory, **sizes)
        assert simulate(ours, costs).seconds <= simulate(fixed, costs).seconds * (1 + 1e-9)


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(2, 6))
def test_it_stays_within_the_memory_and_keeps_the_order_of_sums(seed: int, room: int) -> None:
    costs = random_costs(seed, 4)
    for placement in (loop(2, 2), vee(2)):
        for row in best_order(6, placement, costs, [float(room)] * 2):
            held = 0
            for slot in row:
                held += {Op.F: 1, Op.W: -1, Op.B: -1}.get(slot.op, 0)
                assert held <= room
            for stage in {slot.stage for slot in row}:
                assert {slot.op for slot in row} in ({Op.F, Op.B}, {Op.F, Op.I, Op.W})
                for op in {slot.op for slot in row}:
                    found = [slot.micro_batch for slot in row if (slot.op, slot.stage) == (op, stage)]
                    assert found == list(range(6))


def test_sizes_that_are_no_whole_numbers() -> None:
    costs, placement = replace(Costs.uniform(4), kept_bytes=(2.3, 2.6, 2.0, 2.9)), vee(2)
    memory = kept_peaks(ORDERS["zb_v"].order(2, 4, 2), placement, costs)
    order = greedy(4, placement, costs, memory)
    assert sum(map(len, order)) == 3 * 4 * 4
    for row in order:
        held = accumulate(
            {Op.F: 1, Op.W: -1}.get(slot.op, 0) * Fraction(str(costs.kept_bytes[slot.stage])) for slot in row
        )
        assert max(held) <= Fraction("9.8")


def test_a_bad_order_gets_better() -> None:
    costs, placement = Costs.uniform(2), (0, 1)
    order = best_order(4, placement, costs, [2.0, 2.0])
    late = [sorted(row, key=lambda slot: slot.op is Op.W) for row in order]  # all weight gradients at the end
    better = refine(late, placement, costs, [4.0, 4.0])
    assert [sorted(row) for row in better] == [sorted(row) for row in order]
    seconds = [simulate(lower("x", rows, placement, 4, costs), costs).seconds for rows in (late, better)]
    assert seconds[1] < seconds[0]


def test_with_what_goes_past_stages() -> None:
    skips = [Skip(0, 2, "hidden"), Skip(0, 3, "table", constant=True)]
    costs = random_costs(1, 4)
    made = make_greedy_schedule(costs, num_ranks=2, num_micro_batches=4, placement=vee(2), skips=skips)
    plain = make_schedule("zb_v", num_ranks=2, num_micro_batches=4, costs=costs, skips=skips)
    assert simulate(made, costs).seconds <= simulate(plain, costs).seconds * (1 + 1e-9)
