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
from .instruction import COMPUTE, OPT, Instruction, Op, Value, compute, of_stage, receive, send
from .orders import Order
from .schedule import Schedule


def lower(name: str, order: Order, placement: Sequence[int], num_micro_batches: int, costs: Costs) -> Schedule:
    """Return the schedule that computes in ``order``.

    Args:
        name: What it is called.
        order: By rank, what it computes; each needs what others compute, so it must not be circular.
        placement: The rank of each stage.
        num_micro_batches: In the step.
        costs: Decide which of several computations comes first; they change the order of messages only.

    Raises:
        ValueError: The order is circular, or lacks something: says which computations wait for what.
    """
    trains = any(slot.op is not Op.F for row in order for slot in row)
    todo = [
        [compute(*slot, num_stages=len(placement), trains=trains) for slot in reversed(row)] for row in order
    ]  # last first
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
    rows = [_framed(row, trains=trains) for row in history.rows]
    return Schedule(
        name=name, placement=tuple(placement), num_micro_batches=num_micro_batches, rows=tuple(rows), trains=trains
    )


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


def _framed(row: Sequence[Instruction], *, trains: bool) -> tuple[Instruction, ...]:
    """Add UNSHARD before, RESHARD after each run of a stage's computations, REDUCE after the last, OPT at the end."""
    last = {one.stage: index for index, one in enumerate(row) if one.op in COMPUTE}
    framed: list[Instruction] = []
    closing: list[Instruction] = []  # waits until results have been sent: others need them
    gathered = -1
    for index, one in enumerate(row):
        if one.op is not Op.SEND:
            framed += closing
            closing = []
        if one.op in COMPUTE and one.stage != gathered:
            if gathered >= 0:
                framed.append(of_stage(Op.RESHARD, gathered))
            framed.append(of_stage(Op.UNSHARD, one.stage))
            gathered = one.stage
        framed.append(one)
        if one.op in COMPUTE and last[one.stage] == index:
            closing = [of_stage(Op.RESHARD, one.stage), *([of_stage(Op.REDUCE, one.stage)] if trains else [])]
            gathered = -1
    return (*framed, *closing, OPT) if trains else (*framed, *closing)
