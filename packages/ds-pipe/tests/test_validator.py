"""Every schedule that does not work is refused, for the right reason; none that works is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from ds_pipe import (
    Costs,
    Schedule,
    ScheduleError,
    make_greedy_schedule,
    make_schedule,
    peak_bytes,
    simulate,
    validate,
)
from ds_pipe.instruction import COMPUTE, Instruction, Op, compute, receive, send
from ds_pipe.skips import Skip
from ds_pipe.validate import Reason
from hypothesis import given, settings
from hypothesis import strategies as st

from .rendezvous import Rendezvous

SCHEDULES = [
    make_schedule("gpipe", num_ranks=2, num_micro_batches=3),
    make_schedule("1f1b", num_ranks=3, num_micro_batches=4),
    make_schedule("interleaved", num_ranks=2, num_micro_batches=4),
    make_schedule("looped_bfs", num_ranks=2, num_micro_batches=2, num_chunks=3),
    make_schedule("zb_h1", num_ranks=3, num_micro_batches=4),
    make_schedule("zb_v", num_ranks=2, num_micro_batches=4),
    make_schedule("forward_only", num_ranks=3, num_micro_batches=2),
    make_schedule("1f1b", num_ranks=4, num_micro_batches=3, skips=[(0, 3, "far"), Skip(0, 3, "tie", constant=True)]),
    make_schedule(
        "zb_v", num_ranks=2, num_micro_batches=3, skips=[(0, 2, "one"), (1, 2, "two"), Skip(0, 3, "tie", True)]
    ),
    make_schedule("forward_only", num_ranks=3, num_micro_batches=2, skips=[(0, 2, "far"), Skip(0, 2, "tie", True)]),
]


def with_row(schedule: Schedule, rank: int, row: list[Instruction]) -> Schedule:
    rows = [list(old) for old in schedule.rows]
    rows[rank] = row
    return replace(schedule, rows=tuple(map(tuple, rows)))


def dropped(schedule: Schedule, rank: int, index: int, rng: random.Random) -> Schedule:
    row = list(schedule.rows[rank])
    del row[index]
    return with_row(schedule, rank, row)


def doubled(schedule: Schedule, rank: int, index: int, rng: random.Random) -> Schedule:
    row = list(schedule.rows[rank])
    row.insert(rng.randint(0, len(row)), row[index])
    return with_row(schedule, rank, row)


def swapped(schedule: Schedule, rank: int, index: int, rng: random.Random) -> Schedule:
    row = list(schedule.rows[rank])
    other = rng.randrange(len(row))
    row[index], row[other] = row[other], row[index]
    return with_row(schedule, rank, row)


def retargeted(schedule: Schedule, rank: int, index: int, rng: random.Random) -> Schedule:
    """Another rank, stage or micro-batch."""
    row = list(schedule.rows[rank])
    one = row[index]
    if one.peer >= 0:
        row[index] = one._replace(
            peer=rng.choice([p for p in range(-1, schedule.num_ranks + 1) if p not in (one.peer,)])
        )
    elif one.op in COMPUTE:
        stage = rng.choice([s for s in range(schedule.num_stages) if s != one.stage])
        sizes = {"num_stages": schedule.num_stages, "trains": schedule.trains}
        row[index] = compute(one.op, stage, one.micro_batch, skips=schedule.skips, **sizes)
    else:
        row[index] = one._replace(stage=one.stage + 1)
    return with_row(schedule, rank, row)


def renamed(schedule: Schedule, rank: int, index: int, rng: random.Random) -> Schedule:
    """A message of another value: the skip's, the micro-batch or the stage; or a computation that forgets one."""
    row = list(schedule.rows[rank])
    one = row[index]
    if one.peer >= 0:
        (value,) = (*one.reads, *one.writes)
        other = rng.choice(
            [
                value._replace(name=rng.choice(["", "unknown", *(skip.name for skip in schedule.skips)])),
                value._replace(stage=rng.randrange(schedule.num_stages)),
                value._replace(micro_batch=rng.randint(-1, schedule.num_micro_batches)),
                value._replace(kind=rng.choice("xgst")),
            ]
        )
        row[index] = send(other, one.peer) if one.op is Op.SEND else receive(other, one.peer)
    else:
        field = rng.choice(["reads", "writes", "frees"])
        row[index] = one._replace(**{field: getattr(one, field)[1:]})
    return with_row(schedule, rank, row)


def reversed_part(schedule: Schedule, rank: int, index: int, rng: random.Random) -> Schedule:
    row = list(schedule.rows[rank])
    end = min(len(row), index + rng.randint(2, 5))
    row[index:end] = row[index:end][::-1]
    return with_row(schedule, rank, row)


Mutation = Callable[[Schedule, int, int, random.Random], Schedule]
MUTATIONS: list[Mutation] = [dropped, doubled, swapped, retargeted, renamed, reversed_part]


def mutants(mutation: Mutation, count: int) -> Iterator[Schedule]:
    rng = random.Random(mutation.__name__)
    for _ in range(count):
        schedule = rng.choice(SCHEDULES)
        rank = rng.randrange(schedule.num_ranks)
        yield mutation(schedule, rank, rng.randrange(len(schedule.rows[rank])), rng)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutants_are_refused_if_and_only_if_they_do_not_work(mutation: Mutation) -> None:
    refused = 0
    for mutant in mutants(mutation, 200):
        if Rendezvous(mutant).works():
            validate(mutant)
            continue
        refused += 1
        with pytest.raises(ScheduleError):
            validate(mutant)
    assert refused > 50


def reason_of(schedule: Schedule) -> Reason:
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    return caught.value.reason


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (Op.F, Reason.COUNT),
        (Op.B, Reason.COUNT),
        (Op.SEND, Reason.MISSING_VALUE),
        (Op.RECV, Reason.MISSING_VALUE),
        (Op.UNSHARD, Reason.PARAMETERS),
        (Op.RESHARD, Reason.PARAMETERS),
        (Op.REDUCE, Reason.PARAMETERS),
        (Op.OPT, Reason.PARAMETERS),
    ],
)
def test_the_reason_of_what_is_missing(op: Op, reason: Reason) -> None:
    schedule = SCHEDULES[1]
    for rank, row in enumerate(schedule.rows):
        for index, one in enumerate(row):
            if one.op is op:
                assert reason_of(dropped(schedule, rank, index, random.Random(0))) is reason


def test_the_reason_of_what_is_there_twice() -> None:
    schedule = SCHEDULES[1]
    row = list(schedule.rows[1])
    for op, reason in ((Op.F, Reason.COUNT), (Op.B, Reason.COUNT), (Op.REDUCE, Reason.PARAMETERS)):
        index = next(i for i, one in enumerate(row) if one.op is op)
        assert reason_of(with_row(schedule, 1, [*row[: index + 1], *row[index:]])) is reason


def test_sends_that_wait_for_each_other() -> None:
    schedule = Schedule.parse(
        """schedule crossed placement 0,1 micro_batches 2
        0: F0.0 SEND:x1.0>1 F0.1 SEND:x1.1>1 RECV:g0.0<1 B0.0 RECV:g0.1<1 B0.1 REDUCE0 OPT
        1: RECV:x1.0<0 F1.0 B1.0 SEND:g0.0>0 RECV:x1.1<0 F1.1 B1.1 SEND:g0.1>0 REDUCE1 OPT"""
    )
    with pytest.raises(ScheduleError, match="ranks wait for each other in a circle") as caught:
        validate(schedule)
    assert caught.value.reason is Reason.DEADLOCK
    text = str(caught.value)
    assert "[SEND:g0.0>0]" in text or "[RECV:g0.0<1]" in text
    assert simulate(schedule, Costs.uniform(2)).seconds > 0  # with buffers it would run


def test_messages_in_two_orders() -> None:
    schedule = Schedule.parse(
        """schedule crossed placement 0,1 micro_batches 2 forward_only
        0: F0.0 F0.1 SEND:x1.0>1 SEND:x1.1>1
        1: RECV:x1.1<0 RECV:x1.0<0 F1.0 F1.1"""
    )
    assert reason_of(schedule) is Reason.MESSAGES


def test_what_stands_where_it_does_not_belong() -> None:
    schedule = SCHEDULES[0]
    for text in ("F0.9", "F7.0", "F1.0", "SEND:x1.0>0", "SEND:x1.0>5", "UNSHARD1"):
        row = Schedule.parse(f"schedule s placement 0 micro_batches 1\n0: {text}").rows[0]
        assert reason_of(with_row(schedule, 0, [*row, *schedule.rows[0]])) is Reason.FOREIGN, text


def test_whole_and_split_backwards_of_one_micro_batch() -> None:
    schedule = SCHEDULES[0]
    row = list(schedule.rows[0])
    at = next(i for i, one in enumerate(row) if one.op is Op.B)
    split = [compute(op, 0, row[at].micro_batch, num_stages=2) for op in (Op.I, Op.W)]
    assert reason_of(with_row(schedule, 0, [*row[: at + 1], *split, *row[at + 1 :]])) is Reason.COUNT
    validate(with_row(schedule, 0, [*row[:at], *split, *row[at + 1 :]]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_schedules_of_any_size_and_cost(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 5), "ranks")
    num_micro_batches = data.draw(st.integers(1, 9), "micro-batches")
    name = data.draw(st.sampled_from(["gpipe", "1f1b", "zb_h1", "zb_v", "looped_bfs", "interleaved", "greedy"]))
    num_chunks = data.draw(st.integers(2, 3)) if name in ("looped_bfs", "interleaved", "greedy") else None
    if name == "interleaved":
        num_micro_batches *= num_ranks
    num_stages = num_ranks * {"zb_v": 2}.get(name, num_chunks or 1)
    times = st.floats(0.0, 4.0).map(lambda time: round(time, 2))
    stages = st.lists(times, min_size=num_stages, max_size=num_stages).map(tuple)
    costs = Costs(
        forward=data.draw(stages),
        input_grad=data.draw(stages),
        weight_grad=data.draw(stages),
        kept_bytes=num_stages * (1.0,),
        message_bytes=num_stages * (1.0,),
        latency=data.draw(times),
        bytes_per_second=data.draw(st.sampled_from([0.5, float("inf")])),
    )
    if name == "greedy":
        schedule = make_greedy_schedule(costs, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    else:
        schedule = make_schedule(
            name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_chunks=num_chunks, costs=costs
        )
    validate(schedule)
    assert Rendezvous(schedule).works()
    assert Schedule.parse(str(schedule)) == schedule
    timeline = simulate(schedule, costs)
    work = [sum(map(costs.seconds, row)) for row in schedule.rows]
    assert timeline.busy == pytest.approx(work)
    assert timeline.seconds >= max(work) - 1e-9
    assert min(peak_bytes(schedule, costs)) >= 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line has to read"),
        ("schedule a placement 0 micro_batches x\n0: F0.0", "the first line has to read"),
        ("schedule a placement 0 micro_batches 1\n1: F0.0", "one line per rank has to follow"),
        ("schedule a placement 0 micro_batches 1\n0: G0.0", "rank 0: 'G0.0' is no instruction"),
        ("schedule a placement 0 micro_batches 1\n0: F0", "'F0' is no instruction"),
        ("schedule a placement 0 micro_batches 1\n0: SEND:x1.0<1", "'SEND:x1.0<1' is no instruction"),
        ("schedule a placement 0 micro_batches 1\n0: REDUCE0.1", "'REDUCE0.1' is no instruction"),
    ],
)
def test_texts_that_are_no_schedule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("name", "settings_", "message"),
    [
        ("1F1B", {}, r"there is no schedule '1F1B' \(did you mean '1f1b'\?\); there are gpipe"),
        ("zb-v", {}, r"there is no schedule 'zb-v' \(did you mean 'zb_v'\?\); there are gpipe"),
        ("zigzag", {}, "there is no schedule 'zigzag'; there are gpipe, 1f1b"),
        ("interleaved", {"num_micro_batches": 3}, "multiple of the 2 ranks as number of micro-batches; got 3"),
        ("zb_v", {"num_chunks": 3}, "zb_v has 2 stages on each rank; got num_chunks=3"),
        ("interleaved", {"num_chunks": 1}, "2 or more stages on each rank; got num_chunks=1"),
        ("gpipe", {"num_micro_batches": 0}, "at least one rank and one micro-batch; got 2 and 0"),
    ],
)
def test_numbers_that_no_schedule_has(name: str, settings_: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(name, **{"num_ranks": 2, "num_micro_batches": 4, **settings_})


def test_memory_that_does_not_suffice() -> None:
    with pytest.raises(ValueError, match=r"rank 1 needs 1 bytes .* memory\[1\] is 0.5"):
        make_greedy_schedule(Costs.uniform(2), num_ranks=2, num_micro_batches=2, memory=[1.0, 0.5])
