"""An interpreter of schedules that knows nothing of the validator."""

from __future__ import annotations

from collections import Counter

from ds_pipe import Costs, Schedule
from ds_pipe.instruction import COMPUTE, Instruction, Op, Value


def dataflow(schedule: Schedule, one: Instruction) -> tuple[set[Value], set[Value], set[Value]]:
    """What a computation, LEND or RETURN has to read, write and free; a table, written apart from ``compute``."""
    stage, index, last = one.stage, one.micro_batch, schedule.num_stages - 1
    x, out, g, back = (Value(*key, index) for key in (("x", stage), ("x", stage + 1), ("g", stage), ("g", stage - 1)))
    kept, left = Value("y", stage, index), Value("d", stage, index)
    each = {skip: Value("s", skip.target, -1 if skip.constant else index, skip.name) for skip in schedule.skips}
    grad = {skip: Value("t", skip.source, index, skip.name) for skip in schedule.skips}
    handed = {each[skip] for skip in schedule.skips if skip.source == stage and not skip.constant}
    taken = {each[skip] for skip in schedule.skips if skip.target == stage and not skip.constant}
    lent = {each[skip] for skip in schedule.skips if skip.source == stage and skip.constant}
    borrowed = {each[skip] for skip in schedule.skips if skip.target == stage and skip.constant}
    coming = {grad[skip] for skip in schedule.skips if skip.source == stage} | ({g} if stage < last else set())
    going = {grad[skip] for skip in schedule.skips if skip.target == stage} | ({back} if stage else set())
    inputs = taken | ({x} if stage else set())
    outputs = handed | ({out} if stage < last else set()) | ({kept} if schedule.trains else set())
    return {
        Op.F: (inputs | borrowed, outputs, inputs),
        Op.B: (coming | borrowed | {kept}, going, coming | {kept}),
        Op.I: (coming | borrowed | {kept}, going | {left}, coming),
        Op.W: ({kept, left}, set(), {kept, left}),
        Op.LEND: (set(), lent, set()),
        Op.RETURN: (borrowed, set(), borrowed),
    }[one.op]


class Rendezvous:
    """Runs a schedule with sends that block until they are received; written apart from the validator."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.at = [0] * schedule.num_ranks
        self.alive: list[set[Value]] = [set() for _ in schedule.rows]
        self.written: list[set[Value]] = [set() for _ in schedule.rows]
        self.gathered: set[int] = set()
        self.reduced: set[int] = set()
        self.stepped = [False] * schedule.num_ranks
        self.done: Counter[tuple[Op, int, int]] = Counter()
        self.gathers = any(one.op is Op.UNSHARD for row in schedule.rows for one in row)

    def works(self) -> bool:
        while any(self.moves(rank) for rank in range(self.schedule.num_ranks)):
            pass
        return self.complete()

    def current(self, rank: int) -> Instruction | None:
        row = self.schedule.rows[rank]
        return row[self.at[rank]] if self.at[rank] < len(row) else None

    def moves(self, rank: int) -> bool:
        """Do what a rank is at; it stays there for ever where that cannot be done."""
        one = self.current(rank)
        if one is None or one.op is Op.RECV or self.stepped[rank]:  # a sender moves both
            return False
        if one.op is Op.OPT:
            done = self.stepped[rank] = True
        elif one.op is Op.SEND:
            done = self.sends(rank, one)
        elif one.stage not in self.schedule.stages_of(rank):
            done = False
        else:
            done = self.lends(rank, one) if one.op in (Op.LEND, Op.RETURN) else self.works_on(rank, one)
        self.at[rank] += done
        return done

    def sends(self, rank: int, one: Instruction) -> bool:
        if one.peer not in range(self.schedule.num_ranks) or one.peer == rank:
            return False
        other = self.current(one.peer)
        met = other is not None and other.op is Op.RECV and other.peer == rank and other.writes == one.reads
        if not met or not self.take(rank, one) or not self.make(one.peer, other):
            return False
        self.at[one.peer] += 1
        return True

    def works_on(self, rank: int, one: Instruction) -> bool:
        return self.computes(rank, one) if one.op in COMPUTE else self.handles(one)

    def lends(self, rank: int, one: Instruction) -> bool:
        if tuple(map(set, (one.reads, one.writes, one.frees))) != dataflow(self.schedule, one):
            return False
        if one.op is Op.RETURN:
            return self.take(rank, one)
        return (not self.gathers or one.stage in self.gathered) and self.make(rank, one)

    def computes(self, rank: int, one: Instruction) -> bool:
        if (self.gathers and one.stage not in self.gathered) or (one.op is not Op.F and one.stage in self.reduced):
            return False
        if tuple(map(set, (one.reads, one.writes, one.frees))) != dataflow(self.schedule, one):
            return False
        self.done[one.op, one.stage, one.micro_batch] += 1
        return self.take(rank, one) and self.make(rank, one)

    def take(self, rank: int, one: Instruction) -> bool:
        there = self.alive[rank].issuperset(one.reads)
        self.alive[rank].difference_update(one.frees)
        return there

    def make(self, rank: int, one: Instruction) -> bool:
        fresh = self.written[rank].isdisjoint(one.writes)
        self.alive[rank].update(one.writes)
        self.written[rank].update(one.writes)
        return fresh

    def handles(self, one: Instruction) -> bool:
        """A gather, a release or a reduction."""
        known = self.reduced if one.op is Op.REDUCE else self.gathered
        if (one.stage in known) != (one.op is Op.RESHARD):
            return False
        known.symmetric_difference_update([one.stage])
        return True

    def complete(self) -> bool:
        schedule = self.schedule
        ended = not any(map(self.current, range(schedule.num_ranks))) and not any(self.alive) and not self.gathered
        if schedule.trains:
            ended = ended and all(self.stepped) and len(self.reduced) == schedule.num_stages
        wanted = [[1, 1, 0, 0], [1, 0, 1, 1]] if schedule.trains else [[1, 0, 0, 0]]
        return ended and all(
            [self.done[op, stage, index] for op in (Op.F, Op.B, Op.I, Op.W)] in wanted
            for stage in range(schedule.num_stages)
            for index in range(schedule.num_micro_batches)
        )


def peaks(schedule: Schedule, costs: Costs) -> list[float]:
    """The most bytes alive on each rank: a value lives from the instruction that makes it to the last that reads it."""
    found = []
    for row in schedule.rows:
        made = {value: index for index, one in enumerate(row) for value in one.writes}
        last = {value: index for index, one in enumerate(row) for value in one.reads}
        found.append(
            max(
                sum(costs.nbytes(value) for value, start in made.items() if start <= index <= last[value])
                for index in range(len(row))
            )
        )
    return found
