"""A schedule made for given costs: each rank does what is best at the moment, within its memory.

[Note: Choices]
Whenever a rank is free, it takes of what it can begin at once: a gradient of an input, since the rank before waits for
it; a forward, later chunks first, if what it keeps fits into memory; a weight gradient, for which nobody waits. If
nothing can begin, it waits for what comes first. A forward of a chunk leaves room for one micro-batch of every later
chunk on the rank: without that, a rank could fill up with work that it can never finish.

What is good at the moment may be bad later on. Weight gradients put off keep forwards out of memory: so a rank that
*owes* more of them than it may does one first. Forwards before gradients keep the ranks behind busy, but a forward too
many delays the gradient that comes meanwhile: so forwards may *lead* gradients by some number only. What suits is tried
out, with few numbers for each, and the order that is done first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

from .costs import Costs
from .instruction import Instruction, Op, Value, compute, lend
from .orders import Order, Slot
from .skips import Skip


def greedy(
    num_micro_batches: int,
    placement: Sequence[int],
    costs: Costs,
    memory: Sequence[float],
    *,
    skips: Sequence[Skip] = (),
) -> Order:
    """Return an order made for ``costs``; see [Note: Choices].

    Args:
        num_micro_batches: In the step.
        placement: The rank of each stage.
        costs: Of these stages.
        memory: By rank, bytes that kept activations may take.
        skips: See [Note: Skips].

    Raises:
        ValueError: The memory of a rank does not hold one micro-batch of each of its stages.
    """
    count = num_micro_batches * len(placement)
    policies = [
        _Policy(owed, lead, first) for owed in (0, 1, count) for lead in (1, 2, count) for first in (Op.I, Op.F)
    ]
    states = [_State(num_micro_batches, placement, costs, memory, policy, skips=skips) for policy in policies]
    tried = [_followed(state, 3 * count) for state in states]
    return min(tried, key=lambda state: state.end).order


class _Policy(NamedTuple):
    """What a rank may do; see [Note: Choices]."""

    owed: int  # weight gradients put off, for each rank before this one
    lead: int  # forwards whose gradient has not come, for each rank from this one on
    first: Op  # F or I


def _followed(state: _State, num_choices: int) -> _State:
    for _ in range(num_choices):
        state.do(*state.next())
    return state


class _State:
    """What has been done, and when ranks and values are free."""

    def __init__(
        self,
        num_micro_batches: int,
        placement: Sequence[int],
        costs: Costs,
        memory: Sequence[float],
        policy: _Policy,
        *,
        skips: Sequence[Skip],
    ) -> None:
        self._num_micro_batches = num_micro_batches
        self._placement = placement
        self._costs = costs
        self._free = [0.0] * (max(placement) + 1)
        self._memory = memory
        self._held = [0] * len(placement)  # by stage, micro-batches whose activations are kept
        self._policy = policy
        self._skips = skips
        self._lead = [0] * len(placement)  # by stage, forwards whose gradient has not come
        self._owed = [0] * len(memory)  # weight gradients put off
        self._there: dict[Value, float] = {}
        self._links: dict[tuple[int, int], float] = {}  # when each is free
        self._next = {(op, stage): 0 for op in (Op.F, Op.I, Op.W) for stage in range(len(placement))}
        self.order: Order = [[] for _ in self._free]
        for rank, room in enumerate(memory):
            needed = fsum(costs.kept_bytes[stage] for stage, owner in enumerate(placement) if owner == rank)
            if room < needed:
                raise ValueError(
                    f"rank {rank} needs {needed:g} bytes for one micro-batch of each of its stages; memory[{rank}] is "
                    f"{room:g}"
                )

    @property
    def end(self) -> float:
        """When the last rank is done."""
        return max(self._free)

    def next(self) -> tuple[float, Instruction]:
        """Return what is begun first, and when; of what begins together, the best."""
        found = [
            (max(self._free[rank], ready), *self._rank_of_choice(one), one)
            for rank in range(len(self._free))
            for ready, one in self._candidates(rank)
        ]
        start, *_, one = min(found, key=lambda entry: entry[:-1])
        return start, one

    def do(self, start: float, one: Instruction) -> None:
        """Note that ``one`` begins at ``start``."""
        rank = self._placement[one.stage]
        end = self._free[rank] = start + self._costs.seconds(one)
        self._next[one.op, one.stage] += 1
        self.order[rank].append(Slot(one.op, one.stage, one.micro_batch))
        self._held[one.stage] += {Op.F: 1, Op.W: -1}.get(one.op, 0)
        self._owed[rank] += {Op.I: 1, Op.W: -1}.get(one.op, 0)
        self._lead[one.stage] += {Op.F: 1, Op.I: -1}.get(one.op, 0)
        # what a stage lends leaves after its first forward
        lent = lend(one.stage, self._skips).writes if one.op is Op.F and one.micro_batch == 0 else ()
        for value in (*one.writes, *lent):
            self._there[value] = self._arrival(value, rank, end)

    def _arrival(self, value: Value, rank: int, end: float) -> float:
        """Return when a value is where it is needed; messages take their turns on a link."""
        peer = self._placement[value.stage]
        if peer == rank:
            return end
        arrival = max(end, self._links.get((rank, peer), 0.0)) + self._costs.message_seconds(value)
        self._links[rank, peer] = arrival - self._costs.latency
        return arrival

    def _candidates(self, rank: int) -> list[tuple[float, Instruction]]:
        """What a rank could do next, and when what it needs is there."""
        found = []
        for (op, stage), index in self._next.items():
            if self._placement[stage] != rank or index == self._num_micro_batches:
                continue
            one = compute(op, stage, index, num_stages=len(self._placement), skips=self._skips)
            if all(value in self._there for value in one.reads) and self._fits(rank, one):
                found.append((max([self._there[value] for value in one.reads], default=0.0), one))
        return found

    def _fits(self, rank: int, one: Instruction) -> bool:
        if one.op is not Op.F:
            return True
        # a later chunk that has forwards to come needs room for one of them; counted anew, as what was held back for a
        # forward has to hold it to the last bit
        kept = fsum(
            self._costs.kept_bytes[stage] * (self._held[stage] + (stage == one.stage or self._is_to_come(one, stage)))
            for stage, owner in enumerate(self._placement)
            if owner == rank
        )
        may_lead = self._policy.lead * (len(self._free) - rank) or 1
        return kept <= self._memory[rank] and self._lead[one.stage] < may_lead

    def _is_to_come(self, one: Instruction, stage: int) -> bool:
        return stage > one.stage and self._next[Op.F, stage] < self._num_micro_batches

    def _rank_of_choice(self, one: Instruction) -> tuple[int, int, int]:
        rank = self._placement[one.stage]
        if one.op is Op.W:
            choice = 0 if self._owed[rank] > self._policy.owed * rank else 3
        else:
            choice = 1 if one.op is self._policy.first else 2
        return choice, -one.stage, one.micro_batch
