"""Whether a schedule works, found out before it runs: for all ranks, from the schedule alone.

[Note: What is checked]
1. Every instruction belongs to the pipeline: its rank has the stage, its numbers are in range, its peer is another one,
   it reads and writes what it has to, its skip is one of the schedule's.
2. Each micro-batch is computed once at each stage: F, and when training B, or I and W.
3. Every value is there when it is read: computed or received before on the same rank, once, and not freed.
4. Every SEND has its RECV, and between two ranks both have one order.
5. Ranks whose sends block until they are received come to the end: rows and messages form no circle.
6. Parameters are gathered when they are used or lent, gradients reduced after the last of them, weights stepped after
   that.

The memory of a schedule that works follows from it: :func:`peak_bytes`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from .costs import Costs
from .instruction import COMPUTE, USES_WEIGHTS, Instruction, Op, Value, compute, give_back, lend
from .schedule import Schedule
from .skips import Skip

Place = tuple[int, int]
"""A rank and the index of an instruction in its row."""


class Reason(Enum):
    """Why a schedule does not work; the numbers are those of [Note: What is checked]."""

    FOREIGN = 1  # an instruction does not belong to the pipeline
    COUNT = 2  # a computation is missing, or there twice
    MISSING_VALUE = 3  # a value is not there when it is read, or written twice
    MESSAGES = 4  # sends and receives do not match
    DEADLOCK = 5  # ranks wait for each other in a circle
    PARAMETERS = 6  # parameters not gathered, gradients not reduced, or the step too early


class ScheduleError(ValueError):
    """A schedule does not work; the text shows where.

    Attributes:
        reason: What is wrong.
        places: The instructions at fault, by rank and index.
    """

    def __init__(self, schedule: Schedule, reason: Reason, text: str, places: Sequence[Place]) -> None:
        self.reason = reason
        self.places = tuple(places)
        super().__init__(f"schedule {schedule.name!r}: {text}\n{schedule.grid(places)}")


def validate(schedule: Schedule) -> None:
    r"""Check that a schedule works; see [Note: What is checked].

    Raises:
        ScheduleError: It does not; the first thing that is wrong, with the rows around it and the culprit in brackets.

    Example:
        >>> try:
        ...     validate(Schedule.parse("schedule one placement 0 micro_batches 1\n0: B0.0 F0.0 REDUCE0 OPT"))
        ... except ScheduleError as error:
        ...     print(error)
        schedule 'one': B0.0 on rank 0 needs y0.0, which has been neither computed nor received
        rank 0: [B0.0] F0.0 REDUCE0 OPT
    """
    checks = (_check_belonging, _check_skips, _check_counts, _check_values, _check_messages, _check_progress)
    for check in (*checks, _check_parameters):
        for problem in check(schedule):
            raise ScheduleError(schedule, *problem)


def peak_bytes(schedule: Schedule, costs: Costs) -> list[float]:
    """Return, by rank, the most bytes of values that are alive at once: kept activations, inputs, gradients, messages.

    Exact for a schedule that is valid: a value lives from the instruction that writes it to the one that frees it.
    """
    peaks = []
    for row in schedule.rows:
        alive, peak = 0.0, 0.0
        for one in row:
            alive += sum(map(costs.nbytes, one.writes))
            peak = max(peak, alive)
            alive -= sum(map(costs.nbytes, one.frees))
        peaks.append(peak)
    return peaks


class _Problem(NamedTuple):
    reason: Reason
    text: str
    places: Sequence[Place] = ()


def _instructions(schedule: Schedule) -> Iterator[tuple[Place, Instruction]]:
    for rank, row in enumerate(schedule.rows):
        for index, one in enumerate(row):
            yield (rank, index), one


def _check_belonging(schedule: Schedule) -> Iterator[_Problem]:
    for place, one in _instructions(schedule):
        rank = place[0]
        if one.op is Op.OPT:
            continue
        fault = ""
        if not 0 <= one.stage < schedule.num_stages:
            fault = f"there are stages 0 ... {schedule.num_stages - 1}"
        elif _has_micro_batch(one) and not 0 <= one.micro_batch < schedule.num_micro_batches:
            fault = f"there are micro-batches 0 ... {schedule.num_micro_batches - 1}"
        elif one.peer >= 0 and (one.peer == rank or one.peer >= schedule.num_ranks):
            fault = f"its other end has to be another one of the ranks 0 ... {schedule.num_ranks - 1}"
        elif one.peer < 0 and schedule.placement[one.stage] != rank:
            fault = f"stage {one.stage} lies on rank {schedule.placement[one.stage]}"
        if fault:
            yield _Problem(Reason.FOREIGN, f"{one} on rank {rank}: {fault}", [place])


def _check_skips(schedule: Schedule) -> Iterator[_Problem]:
    skips = {skip.name: skip for skip in schedule.skips}
    for place, one in _instructions(schedule):
        fault = next((found for value in (*one.reads, *one.writes) if (found := _fault_of(value, skips))), "")
        if not fault and one != _as_made(schedule, one):
            fault = "it reads, writes and frees other values than it has to"
        if fault:
            yield _Problem(Reason.FOREIGN, f"{one} on rank {place[0]}: {fault}", [place])


def _has_micro_batch(one: Instruction) -> bool:
    constant = one.peer >= 0 and all(value.micro_batch < 0 and value.name for value in (*one.reads, *one.writes))
    return one.op in COMPUTE or (one.peer >= 0 and not constant)


def _fault_of(value: Value, skips: Mapping[str, Skip]) -> str:
    """Return what is wrong with a value of a skip, or nothing."""
    if not value.name:
        return ""
    if value.name not in skips:
        return f"there is no skip {value.name!r}; there are {', '.join(map(str, skips.values())) or 'none'}"
    skip = skips[value.name]
    into = skip.target if value.kind == "s" else skip.source
    if value.stage != into:
        return f"{'what goes by' if value.kind == 's' else 'the gradient of'} {skip} belongs to stage {into}"
    if (value.micro_batch < 0) != (skip.constant and value.kind == "s"):
        return f"the skip {skip} has {'one value for all micro-batches' if skip.constant else 'one for each'}"
    return ""


def _as_made(schedule: Schedule, one: Instruction) -> Instruction:
    """Return the instruction as it has to be; messages may be of any value."""
    if one.op in COMPUTE:
        stages, trains, skips = schedule.num_stages, schedule.trains, schedule.skips
        return compute(one.op, one.stage, one.micro_batch, num_stages=stages, trains=trains, skips=skips)
    if one.op is Op.LEND:
        return lend(one.stage, schedule.skips)
    return give_back(one.stage, schedule.skips) if one.op is Op.RETURN else one


def _check_counts(schedule: Schedule) -> Iterator[_Problem]:
    places: dict[tuple[Op, int, int], list[Place]] = defaultdict(list)
    for place, one in _instructions(schedule):
        if one.op in COMPUTE:
            places[one.op, one.stage, one.micro_batch].append(place)
    for (op, stage, index), found in places.items():
        if len(found) > 1:
            yield _Problem(Reason.COUNT, f"{op.value}{stage}.{index} is there {len(found)} times", found)
    for stage, rank in enumerate(schedule.placement):
        for index in range(schedule.num_micro_batches):
            has = {op: places.get((op, stage, index), []) for op in COMPUTE}
            if not has[Op.F]:
                yield _Problem(Reason.COUNT, f"F{stage}.{index} is missing on rank {rank}")
            check = _check_backward if schedule.trains else _check_no_backward
            yield from check(has, f"{stage}.{index}", rank)


def _check_backward(has: Mapping[Op, Sequence[Place]], name: str, rank: int) -> Iterator[_Problem]:
    whole, parts = has[Op.B], [*has[Op.I], *has[Op.W]]
    if whole and parts:
        text = f"B{name} does what I{name} and W{name} do: one too many"
        yield _Problem(Reason.COUNT, text, [*whole, *parts])
    if not whole and not (has[Op.I] and has[Op.W]):
        yield _Problem(Reason.COUNT, f"B{name}, or I{name} and W{name}, is missing on rank {rank}", parts)


def _check_no_backward(has: Mapping[Op, Sequence[Place]], name: str, rank: int) -> Iterator[_Problem]:
    found = [*has[Op.B], *has[Op.I], *has[Op.W]]
    if found:
        yield _Problem(Reason.COUNT, f"a backward of {name} in a forward-only schedule, on rank {rank}", found)


def _check_values(schedule: Schedule) -> Iterator[_Problem]:
    for rank, row in enumerate(schedule.rows):
        alive: set[Value] = set()
        written: set[Value] = set()
        for index, one in enumerate(row):
            for value in one.reads:
                if value not in alive:
                    why = "has been given away" if value in written else "has been neither computed nor received"
                    yield _Problem(
                        Reason.MISSING_VALUE, f"{one} on rank {rank} needs {value}, which {why}", [(rank, index)]
                    )
            for value in one.writes:
                if value in written:
                    yield _Problem(Reason.MISSING_VALUE, f"{one} on rank {rank} makes {value} again", [(rank, index)])
            alive.difference_update(one.frees)
            alive.update(one.writes)
            written.update(one.writes)
        if alive:
            unused = ", ".join(sorted(map(str, alive))[:4])
            makers = [(rank, i) for i, one in enumerate(row) if alive.intersection(one.writes)]
            yield _Problem(Reason.MISSING_VALUE, f"nobody on rank {rank} takes {unused}", makers)


def _check_messages(schedule: Schedule) -> Iterator[_Problem]:
    sent: dict[Place, list[tuple[Value, Place]]] = defaultdict(list)
    received: dict[Place, list[tuple[Value, Place]]] = defaultdict(list)
    for place, one in _instructions(schedule):
        if one.op is Op.SEND:
            sent[place[0], one.peer].append((one.reads[0], place))
        elif one.op is Op.RECV:
            received[one.peer, place[0]].append((one.writes[0], place))
    for pair in sorted({*sent, *received}):
        way = f"from rank {pair[0]} to rank {pair[1]}"
        gone, come = Counter(v for v, _ in sent[pair]), Counter(v for v, _ in received[pair])
        for value in gone - come:
            where = [place for v, place in sent[pair] if v == value]
            yield _Problem(Reason.MESSAGES, f"{value} is sent {way}, but not received", where)
        for value in come - gone:
            where = [place for v, place in received[pair] if v == value]
            yield _Problem(Reason.MESSAGES, f"{value} is received {way}, but not sent", where)
        for (value, first), (other, second) in zip(sent[pair], received[pair], strict=False):
            if value != other:
                text = f"{way} the next one sent is {value}, the next one received {other}: one order for both ends"
                yield _Problem(Reason.MESSAGES, text, [first, second])


def _check_progress(schedule: Schedule) -> Iterator[_Problem]:
    ends: dict[tuple[int, int, Value], Place] = {}
    for place, one in _instructions(schedule):
        if one.op is Op.RECV:
            ends[one.peer, place[0], one.writes[0]] = place

    def node(place: Place) -> Place:
        """Both ends of a message are one event: the receiver's place stands for it."""
        one = schedule.rows[place[0]][place[1]]
        return ends[place[0], one.peer, one.reads[0]] if one.op is Op.SEND else place

    graph: TopologicalSorter[Place] = TopologicalSorter()
    for rank, row in enumerate(schedule.rows):
        for index in range(1, len(row)):
            graph.add(node((rank, index)), node((rank, index - 1)))
    try:
        graph.prepare()
    except CycleError as error:
        circle: list[Place] = error.args[1]
        names = " -> ".join(f"rank {rank}: {schedule.rows[rank][index]}" for rank, index in circle)
        yield _Problem(Reason.DEADLOCK, f"ranks wait for each other in a circle: {names}", circle)


def _check_parameters(schedule: Schedule) -> Iterator[_Problem]:
    gathers = any(one.op is Op.UNSHARD for _, one in _instructions(schedule))
    for rank, row in enumerate(schedule.rows):
        state = _Parameters(gathers=gathers)
        for index, one in enumerate(row):
            fault = state.fault_of(one)
            if fault:
                yield _Problem(Reason.PARAMETERS, f"{one} on rank {rank}: {fault}", [(rank, index)])
        if schedule.trains:
            for stage in schedule.stages_of(rank):
                if stage not in state.reduced:
                    yield _Problem(Reason.PARAMETERS, f"REDUCE{stage} is missing on rank {rank}")
            if not state.stepped:
                yield _Problem(Reason.PARAMETERS, f"OPT is missing on rank {rank}")
        if state.gathered:
            yield _Problem(Reason.PARAMETERS, f"RESHARD{min(state.gathered)} is missing on rank {rank}")


class _Parameters:
    """What has become of the parameters of one rank's stages so far."""

    def __init__(self, *, gathers: bool) -> None:
        self._gathers = gathers
        self.gathered: set[int] = set()
        self.reduced: set[int] = set()
        self.stepped = False

    def fault_of(self, one: Instruction) -> str:
        """Take in the next instruction; return what is wrong with it, or nothing."""
        stage = one.stage
        if self.stepped:
            return "comes after the optimizer step"
        if one.op in USES_WEIGHTS and self._gathers and stage not in self.gathered:
            return f"the parameters of stage {stage} are not gathered"
        if one.op in COMPUTE - {Op.F} and stage in self.reduced:
            return f"the gradients of stage {stage} have been reduced"
        if one.op is Op.UNSHARD and stage in self.gathered:
            return "they are gathered"
        if one.op is Op.RESHARD and stage not in self.gathered:
            return "they are not gathered"
        if one.op is Op.REDUCE and stage in self.reduced:
            return "they have been reduced"
        if one.op is Op.UNSHARD:
            self.gathered.add(stage)
        elif one.op is Op.RESHARD:
            self.gathered.discard(stage)
        elif one.op is Op.REDUCE:
            self.reduced.add(stage)
        self.stepped = one.op is Op.OPT
        return ""
