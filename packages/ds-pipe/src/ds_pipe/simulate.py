"""When everything in a schedule happens, given what it costs.

Each rank does one thing at a time, in the order of its row. A message leaves when its SEND is reached, travels by
itself, one after the other on each link and direction, and is there latency + bytes / speed later; RECV costs nothing,
and whoever needs the value waits for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .costs import Costs
from .instruction import Instruction, Op, Value
from .schedule import Schedule


class Event(NamedTuple):
    """An instruction and when it runs."""

    instruction: Instruction
    start: float
    end: float  # of a SEND: when the message is there


class Timeline(NamedTuple):
    """What :func:`simulate` found.

    Example:
        >>> from .build import make_schedule
        >>> timeline = simulate(make_schedule("gpipe", num_ranks=4, num_micro_batches=8), Costs.uniform(4))
        >>> timeline.seconds, round(timeline.bubble_share, 3)
        (33.0, 0.273)
    """

    rows: Sequence[Sequence[Event]]  # by rank
    busy: Sequence[float]  # by rank, seconds of computing, gathering and reducing
    idle: Sequence[float]  # by rank, seconds of waiting between its first and its last work

    @property
    def seconds(self) -> float:
        """When the last rank is done."""
        return max((row[-1].end for row in self.rows if row), default=0.0)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time in which they do nothing."""
        return 1.0 - sum(self.busy) / (self.seconds * len(self.rows)) if self.seconds else 0.0


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Return when everything happens.

    Args:
        schedule: A valid one; see ``validate``.
        costs: Of as many stages.

    Raises:
        ValueError: The costs are for another number of stages, or the schedule cannot be followed.
    """
    if costs.num_stages != schedule.num_stages:
        raise ValueError(f"costs of {schedule.num_stages} stages are needed; got {costs.num_stages}")
    clock = _Clock(schedule, costs)
    while clock.advance():
        pass
    stuck = [
        f"rank {rank} at {row[clock.at[rank]]}" for rank, row in enumerate(schedule.rows) if clock.at[rank] < len(row)
    ]
    if stuck:
        raise ValueError(f"schedule {schedule.name!r} cannot be followed, validate() says why: {'; '.join(stuck)}")
    busy = [sum(e.end - e.start for e in row if e.instruction.op is not Op.SEND) for row in clock.rows]
    spans = [_span(row) for row in clock.rows]
    return Timeline(clock.rows, busy, [span - work for span, work in zip(spans, busy, strict=True)])


def _span(row: Sequence[Event]) -> float:
    """Seconds from a rank's first work to its last."""
    working = [event for event in row if event.end > event.start and event.instruction.op is not Op.SEND]
    return working[-1].end - working[0].start if working else 0.0


class _Clock:
    """Where every rank is."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self._schedule = schedule
        self._costs = costs
        self._free = [0.0] * schedule.num_ranks
        self._there: list[dict[Value, float]] = [{} for _ in schedule.rows]
        self._links: dict[tuple[int, int], float] = defaultdict(float)  # when each is free
        self._sent: dict[tuple[int, Value], float] = {}  # when a message arrives, by receiver
        self.at = [0] * schedule.num_ranks
        self.rows: list[list[Event]] = [[] for _ in schedule.rows]

    def advance(self) -> bool:
        """Let every rank run as far as it can; False if none can go on."""
        moved = False
        for rank, row in enumerate(self._schedule.rows):
            while self.at[rank] < len(row) and self._step(rank, row[self.at[rank]]):
                self.at[rank] += 1
                moved = True
        return moved

    def _step(self, rank: int, one: Instruction) -> bool:
        there = self._there[rank]
        if one.op is Op.RECV:
            arrival = self._sent.get((rank, one.writes[0]))
            if arrival is None:
                return False
            there[one.writes[0]] = arrival
            self.rows[rank].append(Event(one, self._free[rank], self._free[rank]))
            return True
        if any(value not in there for value in one.reads):
            return False
        start = max([self._free[rank], *(there[value] for value in one.reads)])
        if one.op is Op.SEND:
            value, link = one.reads[0], (rank, one.peer)
            start = max(there[value], self._links[link])
            end = start + self._costs.message_seconds(value)
            self._links[link] = end - self._costs.latency
            self._sent[one.peer, value] = end
        else:
            end = self._free[rank] = start + self._costs.seconds(one)
            there.update(dict.fromkeys(one.writes, end))
        self.rows[rank].append(Event(one, start, end))
        return True
