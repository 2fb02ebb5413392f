"""From an order of computations to a whole schedule: messages, gathers, reductions and the optimizer step.

[Note: One history]
Computations are laid out one after the other, always the one that can begin first. Where a value leaves its rank, SEND
is written into the sender's row and RECV into the receiver's at the same moment. So all rows are parts of one history
in which both ends of each message meet; ranks whose sends block until they are received can follow it, and none waits
for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .costs import Costs
from .instruction import (
    OPT,
    USES_WEIGHTS,
    Instruction,
    Op,
    Value,
    compute,
    give_back,
    lend,
    of_stage,
    receive,
    send,
)
from .orders import Order, Slot
from .schedule import Schedule
from .skips import Skip


def lower(
    name: str,
    order: Order,
    placement: Sequence[int],
    num_micro_batches: int,
    costs: Costs,
    *,
    skips: Sequence[Skip] = (),
) -> Schedule:
    """Return the schedule that computes in ``order``.

    Args:
        name: What it is called.
        order: By rank, what it computes; each needs what others compute, so it must not be circular.
        placement: The rank of each stage.
        num_micro_batches: In the step.
        costs: Decide which of several computations comes first; they change the order of messages only.
        skips: See [Note: Skips].

    Raises:
        ValueError: The order is circular, or lacks something: says which computations wait for what.
    """
    trains = any(slot.op is not Op.F for row in order for slot in row)
    todo = [_computations(row, len(placement), skips, trains=trains)[::-1] for row in order]  # last first
    history = _History(placement, costs)
    while any(todo):
        startable = [
            (history.start(rank, row[-1]), rank)
            for rank, row in enumerate(todo)
            if row and history.has(rank, row[-1].reads)
        ]
        if not startable:
            waiting = [
                f"rank {rank} needs {missing} for {row[-1]}"
                for rank, row in enumerate(todo)
                if row
                for missing in row[-1].reads
                if not history.has(rank, [missing])
            ]
            raise ValueError(f"the order of {name} cannot be followed: {'; '.join(waiting)}")
        _, rank = min(startable)
        history.compute(rank, todo[rank].pop())
    rows = [_framed(row, skips, trains=trains) for row in history.rows]
    return Schedule(
        name=name,
        placement=tuple(placement),
        num_micro_batches=num_micro_batches,
        rows=tuple(rows),
        trains=trains,
        skips=tuple(skips),
    )


def _computations(row: Sequence[Slot], num_stages: int, skips: Sequence[Skip], *, trains: bool) -> list[Instruction]:
    """Return what a rank computes; what a stage lends it hands out after its first forward, for which others wait."""
    made = []
    has_lent: set[int] = set()
    for slot in row:
        made.append(compute(*slot, num_stages=num_stages, trains=trains, skips=skips))
        lending = lend(slot.stage, skips)
        if lending.writes and slot.stage not in has_lent:
            made.append(lending)
            has_lent.add(slot.stage)
    return made


class _History:
    """See [Note: One history]."""

    def __init__(self, placement: Sequence[int], costs: Costs) -> None:
        self._placement = placement
        self._costs = costs
        self._free = [0.0] * (max(placement) + 1)  # when each rank has done what it has so far
        self._arrivals: dict[tuple[int, Value], float] = {}
        self.rows: list[list[Instruction]] = [[] for _ in self._free]

    def has(self, rank: int, values: Iterable[Value]) -> bool:
        return all((rank, value) in self._arrivals for value in values)

    def start(self, rank: int, instruction: Instruction) -> float:
        return max([self._free[rank], *(self._arrivals[rank, value] for value in instruction.reads)])

    def compute(self, rank: int, instruction: Instruction) -> None:
        end = self.start(rank, instruction) + self._costs.seconds(instruction)
        self._free[rank] = end
        self.rows[rank].append(instruction)
        for value in instruction.writes:
            consumer = self._placement[value.stage]
            self._arrivals[consumer, value] = end
            if consumer != rank:
                self._arrivals[consumer, value] += self._costs.message_seconds(value)
                self.rows[rank].append(send(value, consumer))
                self.rows[consumer].append(receive(value, rank))


def _framed(row: Sequence[Instruction], skips: Sequence[Skip], *, trains: bool) -> tuple[Instruction, ...]:
    """Add UNSHARD before and RESHARD after each run of a stage's work, RETURN and REDUCE after all, OPT at the end."""
    last = {one.stage: index for index, one in enumerate(row) if one.op in USES_WEIGHTS}
    framed: list[Instruction] = []
    closing: list[Instruction] = []  # waits until results have been sent: others need them
    gathered = -1
    for index, one in enumerate(row):
        if one.op is not Op.SEND:
            framed += closing
            closing = []
        if one.op in USES_WEIGHTS and one.stage != gathered:
            if gathered >= 0:
                framed.append(of_stage(Op.RESHARD, gathered))
            framed.append(of_stage(Op.UNSHARD, one.stage))
            gathered = one.stage
        framed.append(one)
        if one.op in USES_WEIGHTS and last[one.stage] == index:
            returning = give_back(one.stage, skips)
            closing = [of_stage(Op.RESHARD, one.stage), *([returning] if returning.reads else [])]
            closing += [of_stage(Op.REDUCE, one.stage)] if trains else []
            gathered = -1
    return (*framed, *closing, OPT) if trains else (*framed, *closing)
