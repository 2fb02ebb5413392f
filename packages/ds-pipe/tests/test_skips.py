"""Skips in schedules: both ends match, memory is exact, and what is wrong is refused."""

from __future__ import annotations

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
from ds_pipe.build import evaluation_of, with_skips
from ds_pipe.instruction import Instruction, Op, receive, send
from ds_pipe.skips import Skip
from ds_pipe.validate import Reason
from hypothesis import given, settings
from hypothesis import strategies as st

from .rendezvous import Rendezvous, peaks

FAR, TIE, NEAR = Skip(0, 3, "far"), Skip(0, 3, "tie", constant=True), Skip(1, 2, "near")
SCHEDULE = make_schedule("1f1b", num_ranks=4, num_micro_batches=2, skips=[FAR, TIE, NEAR])


def test_text_of_a_schedule_with_skips() -> None:
    schedule = make_schedule("gpipe", num_ranks=3, num_micro_batches=1, skips=[Skip(0, 2, "tie", True), (0, 2, "far")])
    assert str(schedule) == (
        "schedule gpipe placement 0,1,2 micro_batches 1 skips 0=2:tie,0>2:far\n"
        "0: UNSHARD0 F0.0 SEND:x1.0>1 SEND:s2.0:far>2 LEND0 SEND:s2:tie>2 RECV:t0.0:tie<2 RECV:t0.0:far<2 "
        "RECV:g0.0<1 B0.0 RESHARD0 REDUCE0 OPT\n"
        "1: RECV:x1.0<0 UNSHARD1 F1.0 SEND:x2.0>2 RECV:g1.0<2 B1.0 SEND:g0.0>0 RESHARD1 REDUCE1 OPT\n"
        "2: RECV:s2.0:far<0 RECV:s2:tie<0 RECV:x2.0<1 UNSHARD2 F2.0 B2.0 SEND:g1.0>1 SEND:t0.0:tie>0 "
        "SEND:t0.0:far>0 RESHARD2 RETURN2 REDUCE2 OPT"
    )


def test_what_is_constant_is_sent_once_and_within_a_rank_not_at_all() -> None:
    skips = [Skip(0, 3, "tie", constant=True), Skip(0, 3, "far")]
    apart = make_schedule("1f1b", num_ranks=4, num_micro_batches=5, skips=skips)
    sent = [one.reads[0] for row in apart.rows for one in row if one.op is Op.SEND]
    assert sum(value.name == "tie" and value.kind == "s" for value in sent) == 1
    assert sum(value.name == "tie" and value.kind == "t" for value in sent) == 5
    assert sum(value.name == "far" for value in sent) == 10
    together = make_schedule("zb_v", num_ranks=2, num_micro_batches=5, skips=skips)  # both ends on rank 0
    assert not any(one.reads[0].name for row in together.rows for one in row if one.op is Op.SEND)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    num_ranks, num_micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    name = draw(
        st.sampled_from(["gpipe", "1f1b", "zb_h1", "zb_v", "looped_bfs", "interleaved", "forward_only", "greedy"])
    )
    num_chunks = draw(st.integers(2, 3)) if name in ("looped_bfs", "interleaved", "forward_only", "greedy") else None
    num_micro_batches *= num_ranks if name == "interleaved" else 1
    num_stages = num_ranks * {"zb_v": 2}.get(name, num_chunks or 1)
    ends = st.tuples(st.integers(0, num_stages - 1), st.integers(0, num_stages - 1)).filter(
        lambda pair: pair[0] < pair[1]
    )
    pairs = draw(st.lists(st.tuples(ends, st.booleans()), max_size=5)) if num_stages > 1 else []
    skips = [Skip(*pair, f"skip{index}", constant) for index, (pair, constant) in enumerate(pairs)]
    sizes = st.integers(0, 9).map(float)
    each = st.lists(sizes, min_size=num_stages, max_size=num_stages).map(tuple)
    costs = Costs(
        forward=draw(each),
        input_grad=draw(each),
        weight_grad=draw(each),
        kept_bytes=draw(each),
        message_bytes=draw(each),
        skip_bytes={skip.name: draw(sizes) for skip in skips},
        latency=draw(sizes),
        bytes_per_second=2.0,
    )
    counts = {"num_ranks": num_ranks, "num_micro_batches": num_micro_batches}
    if name == "greedy":
        return make_greedy_schedule(costs, skips=skips, **counts), costs
    return make_schedule(name, num_chunks=num_chunks, costs=costs, skips=skips, **counts), costs


@settings(max_examples=40, deadline=None)
@given(made=pipelines())
def test_schedules_with_any_skips(made: tuple[Schedule, Costs]) -> None:
    schedule, costs = made
    validate(schedule)
    assert Rendezvous(schedule).works()
    assert Schedule.parse(str(schedule)) == schedule
    assert peak_bytes(schedule, costs) == peaks(schedule, costs)
    timeline = simulate(schedule, costs)
    ends = {(rank, event.instruction): event.end for rank, row in enumerate(timeline.rows) for event in row}
    for rank, row in enumerate(timeline.rows):
        arrived = {}
        for event in row:
            one = event.instruction
            if one.op is Op.RECV:
                arrived[one.writes[0]] = ends[one.peer, send(one.writes[0], rank)]
            assert all(event.start >= arrived[value] for value in one.reads if value in arrived)


def test_the_memory_of_a_skip_and_of_what_is_lent() -> None:
    """One micro-batch of GPipe: the last rank holds both of them at its forward pass, the first both gradients."""
    quiet = {"forward": 4 * (1.0,), "input_grad": 4 * (1.0,), "weight_grad": 4 * (1.0,), "kept_bytes": 4 * (0.0,)}
    costs = Costs(message_bytes=4 * (0.0,), skip_bytes={"far": 3.0, "tie": 5.0}, **quiet)
    schedule = make_schedule("gpipe", num_ranks=4, num_micro_batches=1, skips=[FAR, TIE])
    # rank 3 at B: the lent weight, its gradient, and that of the skip; rank 0 waits for both gradients
    assert peak_bytes(schedule, costs) == [8.0, 0.0, 0.0, 5.0 + 5.0 + 3.0]
    many = make_schedule("gpipe", num_ranks=4, num_micro_batches=4, skips=[FAR, TIE])
    assert peak_bytes(many, costs)[3] == 5.0 + 4 * 3.0  # what is lent is there once


def test_the_time_of_a_skip() -> None:
    """It travels beside the stages between, on a link of its own."""
    base = {"forward": 3 * (1.0,), "input_grad": 3 * (1.0,), "weight_grad": 3 * (0.0,), "kept_bytes": 3 * (0.0,)}
    for nbytes, want in ((1.0, 6.0), (5.0, 1.0 + 5.0 + 1.0 + 1.0 + 5.0 + 1.0)):
        costs = Costs(message_bytes=3 * (0.0,), skip_bytes={"far": nbytes}, bytes_per_second=1.0, **base)
        schedule = make_schedule("gpipe", num_ranks=3, num_micro_batches=1, skips=[Skip(0, 2, "far")])
        assert simulate(schedule, costs).seconds == pytest.approx(want)


@settings(max_examples=20, deadline=None)
@given(made=pipelines())
def test_skips_taken_from_a_schedule_and_put_back(made: tuple[Schedule, Costs]) -> None:
    schedule, costs = made
    without = with_skips(schedule, [], costs=costs)
    assert not any(value.name for row in without.rows for one in row for value in one.writes)
    assert with_skips(without, schedule.skips, costs=costs) == schedule
    assert evaluation_of(schedule).skips == schedule.skips


# Refused #


def changed(rank: int, row: list[Instruction]) -> Schedule:
    rows = list(SCHEDULE.rows)
    rows[rank] = tuple(row)
    return replace(SCHEDULE, rows=tuple(rows))


def refusal(schedule: Schedule) -> tuple[Reason, str]:
    assert not Rendezvous(schedule).works()
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    return caught.value.reason, str(caught.value)


MESSAGES = [
    (rank, index)
    for rank, row in enumerate(SCHEDULE.rows)
    for index, one in enumerate(row)
    if one.peer >= 0 and (*one.reads, *one.writes)[0].name
]


@pytest.mark.parametrize(("rank", "index"), MESSAGES)
def test_every_message_of_a_skip_is_needed_once_between_its_ranks_in_its_place(rank: int, index: int) -> None:
    row = list(SCHEDULE.rows[rank])
    one = row[index]
    (value,) = (*one.reads, *one.writes)
    make = send if one.op is Op.SEND else receive
    assert refusal(changed(rank, row[:index] + row[index + 1 :]))[0] is Reason.MISSING_VALUE
    assert refusal(changed(rank, [*row[:index], one, *row[index:]]))[0] is Reason.MISSING_VALUE
    other = next(peer for peer in range(4) if peer not in (rank, one.peer))
    reason, text = refusal(changed(rank, [*row[:index], one._replace(peer=other), *row[index + 1 :]]))
    assert reason is Reason.MESSAGES
    assert str(value) in text
    for wrong, part in (
        (value._replace(name="unknown"), "there is no skip 'unknown'; there are 0>3:far, 0=3:tie, 1>2:near"),
        (value._replace(stage=3 - value.stage), "belongs to stage"),
        (value._replace(micro_batch=-1 - value.micro_batch if value.micro_batch < 1 else -1), "for"),
    ):
        reason, text = refusal(changed(rank, [*row[:index], make(wrong, one.peer), *row[index + 1 :]]))
        assert reason is Reason.FOREIGN, text
        assert part in text
    if value.kind == "t" and value.name != "near":
        another = value._replace(name={"far": "tie", "tie": "far"}[value.name])
        wrong_skip = changed(rank, [*row[:index], make(another, one.peer), *row[index + 1 :]])
        assert refusal(wrong_skip)[0] is Reason.MISSING_VALUE


@pytest.mark.parametrize(("rank", "kind", "first", "second"), [(0, "s", "far", "tie"), (3, "t", "far", "tie")])
def test_messages_of_two_skips_keep_one_order(rank: int, kind: str, first: str, second: str) -> None:
    row = list(SCHEDULE.rows[rank])
    places = [
        next(i for i, one in enumerate(row) if one.op is Op.SEND and one.reads[0][::3] == (kind, name))
        for name in (first, second)
    ]
    end = max(places)
    moved = [*row[: min(places)], *row[min(places) + 1 : end + 1], row[min(places)], *row[end + 1 :]]
    assert refusal(changed(rank, moved))[0] is Reason.MESSAGES


@pytest.mark.parametrize(
    ("op", "rank", "reason", "part"),
    [
        (Op.LEND, 0, Reason.MISSING_VALUE, "needs s3:tie, which has been neither computed nor received"),
        (Op.RETURN, 3, Reason.MISSING_VALUE, "nobody on rank 3 takes s3:tie"),
    ],
)
def test_what_is_lent_and_returned(op: Op, rank: int, reason: Reason, part: str) -> None:
    row = list(SCHEDULE.rows[rank])
    index = next(i for i, one in enumerate(row) if one.op is op)
    found, text = refusal(changed(rank, row[:index] + row[index + 1 :]))
    assert found is reason
    assert part in text
    found, text = refusal(changed(rank, [*row[:index], row[index], *row[index:]]))
    assert found is Reason.MISSING_VALUE
    assert "again" in text or "given away" in text
    if op is Op.LEND:
        found, text = refusal(changed(rank, [row[index], *row[:index], *row[index + 1 :]]))
        assert found is Reason.PARAMETERS
        assert "the parameters of stage 0 are not gathered" in text
    else:
        first = next(i for i, one in enumerate(row) if one.op is Op.B)
        early = [*row[:first], row[index], *row[first:index], *row[index + 1 :]]
        found, text = refusal(changed(rank, early))
        assert found is Reason.MISSING_VALUE
        assert "needs s3:tie, which has been given away" in text


def test_a_computation_that_forgets_its_skip() -> None:
    row = list(SCHEDULE.rows[3])
    index = next(i for i, one in enumerate(row) if one.op is Op.F)
    row[index] = row[index]._replace(reads=row[index].reads[:1])
    reason, text = refusal(changed(3, row))
    assert reason is Reason.FOREIGN
    assert "it reads, writes and frees other values than it has to" in text


@pytest.mark.parametrize(
    ("skips", "message"),
    [
        ([(2, 1, "a")], "skip 2>1:a: from a stage to a later one of the stages 0 ... 3"),
        ([(0, 4, "a")], "skip 0>4:a: from a stage to a later one"),
        ([(0, 2, "a"), Skip(0, 3, "a", constant=True)], "skips 0>2:a and 0=3:a: each needs a name of its own"),
        ([(0, 2, "a b")], "skip 'a b': a name is some characters, without blanks"),
    ],
)
def test_skips_that_no_pipeline_has(skips: list[Skip], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule("gpipe", num_ranks=4, num_micro_batches=1, skips=skips)
    with pytest.raises(ValueError, match=message):
        make_greedy_schedule(Costs.uniform(4), num_ranks=4, num_micro_batches=1, skips=skips)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule a placement 0 micro_batches 1 skips\n0: F0.0", "the first line has to read"),
        ("schedule a placement 0,0 micro_batches 1 skips 0-1:a\n0: F0.0", "'0-1:a' is no skip; one reads 0>3:name"),
        ("schedule a placement 0,0 micro_batches 1 skips 1>0:a\n0: F0.0", "skip 1>0:a: from a stage to a later one"),
        ("schedule a placement 0,0 micro_batches 1 skips 0>1:a\n0: SEND:s1.0>1", "'SEND:s1.0>1' is no instruction"),
        ("schedule a placement 0,0 micro_batches 1 skips 0>1:a\n0: SEND:x1:a>1", "'SEND:x1:a>1' is no instruction"),
        ("schedule a placement 0,0 micro_batches 1 skips 0>1:a\n0: LEND0.1", "'LEND0.1' is no instruction"),
    ],
)
def test_texts_that_are_no_schedule_with_skips(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)
