"""Orders for given costs: the greedy one, or a fixed one that suits, made better by small changes.

A change moves one computation of one rank some places. It is kept if the step takes no longer: what changes
nothing now makes room for something else. Computations of one kind, stage by stage, keep the order of their
micro-batches, so sums of gradients keep their bits. Whatever the ranks try, they try the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from operator import le
from typing import NamedTuple

from .costs import Costs
from .greedy import greedy
from .instruction import Op, Value, compute, lend
from .orders import ORDERS, TRAINING, Order, Slot
from .skips import Skip

_WORK = 400_000  # computations to look at, about a second
_MOST = 3000  # changes to try
_SEEDS = 3  # orders to begin with
_FAR = 6  # places


def best_order(
    num_micro_batches: int,
    placement: Sequence[int],
    costs: Costs,
    memory: Sequence[float],
    others: Sequence[Order] = (),
    *,
    skips: Sequence[Skip] = (),
) -> Order:
    """Return an order made for ``costs``, at least as good as ``greedy``'s and as ``others``.

    Time: about a second.

    Args:
        num_micro_batches: In the step.
        placement: The rank of each stage.
        costs: Of these stages.
        memory: By rank, bytes that kept activations may take.
        others: That fit into it: :func:`fixed_orders`.
        skips: See [Note: Skips].

    Raises:
        ValueError: The memory of a rank does not hold one micro-batch of each of its stages.
    """
    timed = _Timed(placement, costs, skips)
    seeds = [greedy(num_micro_batches, placement, costs, memory, skips=skips), *others]
    seeds.sort(key=timed.seconds)
    return min((refine(order, placement, costs, memory, skips=skips) for order in seeds[:_SEEDS]), key=timed.seconds)


def refine(
    order: Order,
    placement: Sequence[int],
    costs: Costs,
    memory: Sequence[float],
    *,
    skips: Sequence[Skip] = (),
) -> Order:
    """Return an order that takes no longer than ``order``.

    Args:
        order: One that can be followed, within the memory.
        placement: The rank of each stage.
        costs: Of these stages.
        memory: By rank, bytes that kept activations may take.
        skips: See [Note: Skips].
    """
    timed = _Timed(placement, costs, skips)
    rows = [list(row) for row in order]
    best = timed.seconds(rows)
    chance = random.Random(0)
    for _ in range(min(_MOST, _WORK // (1 + sum(map(len, rows))))):
        rank = chance.randrange(len(rows))
        start = chance.randrange(len(rows[rank]))
        end = start + chance.choice((-1, 1)) * chance.randint(1, _FAR)
        moved = _moved(rows[rank], start, end)
        if moved is None or timed.peak(moved) > memory[rank]:
            continue
        before, rows[rank] = rows[rank], moved
        seconds = timed.seconds(rows)
        if seconds > best:
            rows[rank] = before
        else:
            best = seconds
    return rows


def fixed_orders(
    num_micro_batches: int, placement: Sequence[int], costs: Costs, memory: Sequence[float]
) -> list[Order]:
    """Return the fixed orders for this placement that fit into the memory, as they are and with halved backward passes.

    Args:
        num_micro_batches: In the step.
        placement: The rank of each stage.
        costs: Of these stages.
        memory: By rank, bytes that kept activations may take.
    """
    plain = _fixed(num_micro_batches, placement)
    halved = [[halves(row) for row in order] for order in plain]
    found = plain + [order for order in halved if order not in plain]
    timed = _Timed(placement, costs, ())
    return [order for order in found if all(map(le, map(timed.peak, order), memory))]


def halves(row: Iterable[Slot]) -> list[Slot]:
    """Return ``row`` with each whole backward pass as its two halves, one after the other."""
    parts = {Op.B: (Op.I, Op.W)}
    return [slot._replace(op=op) for slot in row for op in parts.get(slot.op, (slot.op,))]


def kept_peaks(order: Order, placement: Sequence[int], costs: Costs) -> list[float]:
    """Return, by rank, the most bytes of activations that are kept at a time.

    Args:
        order: What the ranks compute.
        placement: The rank of each stage.
        costs: Of these stages.

    Example:
        >>> from .orders import gpipe, one_f_one_b
        >>> [kept_peaks(order(2, 4), (0, 1), Costs.uniform(2)) for order in (gpipe, one_f_one_b)]
        [[4.0, 4.0], [2.0, 1.0]]
    """
    timed = _Timed(placement, costs, ())
    return [timed.peak(row) for row in order]


def _fixed(num_micro_batches: int, placement: Sequence[int]) -> list[Order]:
    """Return the fixed orders for this placement."""
    num_ranks = max(placement) + 1
    chunks = len(placement) // num_ranks
    found = []
    for name in TRAINING:
        fixed = ORDERS[name]
        fewest, most = fixed.chunks
        fits = fewest <= chunks and (most is None or chunks <= most)
        if not fits or fixed.placement(num_ranks, chunks) != tuple(placement):
            continue
        if name == "interleaved" and num_micro_batches % num_ranks:
            continue
        found.append(fixed.order(num_ranks, num_micro_batches, chunks))
    return found


def _moved(row: Sequence[Slot], start: int, end: int) -> list[Slot] | None:
    """Return ``row`` with one computation elsewhere; None if what it passes has to stay before or after it."""
    if not 0 <= end < len(row):
        return None
    one = row[start]
    passed = row[start + 1 : end + 1] if end > start else row[end:start]
    for other in passed:
        if other.stage == one.stage and (other.op is one.op or other.micro_batch == one.micro_batch):
            return None
    rest = [*row[:start], *row[start + 1 :]]
    return [*rest[:end], one, *rest[end:]]


class _Known(NamedTuple):
    """Of one computation."""

    seconds: float
    reads: Sequence[Value]
    writes: Sequence[tuple[Value, int, float]]  # each with its consumer's rank, and how long it takes up the link


class _Timed:
    """Follows orders quickly: what each computation needs, makes and takes is looked up."""

    def __init__(self, placement: Sequence[int], costs: Costs, skips: Sequence[Skip]) -> None:
        self._placement = placement
        self._costs = costs
        self._skips = skips
        self._kept = costs.kept_bytes
        self._known: dict[Slot, _Known] = {}

    def seconds(self, rows: Sequence[Sequence[Slot]]) -> float:
        free, at = [0.0] * len(rows), [0] * len(rows)
        there: dict[Value, float] = {}
        links: dict[tuple[int, int], float] = {}  # when each is free
        todo = sum(map(len, rows))
        while todo:
            before = todo
            for rank, row in enumerate(rows):
                now, index = free[rank], at[rank]
                while index < len(row):
                    lasts, reads, writes = self._of(row[index])
                    try:
                        for value in reads:
                            now = max(now, there[value])
                    except KeyError:
                        break
                    now += lasts
                    for value, peer, passing in writes:
                        if peer == rank:
                            there[value] = now
                        else:
                            free_again = max(now, links.get((rank, peer), 0.0)) + passing
                            links[rank, peer] = free_again
                            there[value] = free_again + self._costs.latency
                    index += 1
                todo -= index - at[rank]
                free[rank], at[rank] = (now, index) if index > at[rank] else (free[rank], index)
            if todo == before:
                return float("inf")
        return max(free)

    def peak(self, row: Sequence[Slot]) -> float:
        held = peak = 0.0
        for slot in row:
            if slot.op is Op.F:
                held += self._kept[slot.stage]
                peak = max(peak, held)
            elif slot.op in (Op.B, Op.W):
                held -= self._kept[slot.stage]
        return peak

    def _of(self, slot: Slot) -> _Known:
        found = self._known.get(slot)
        if found is None:
            one = compute(*slot, num_stages=len(self._placement), skips=self._skips)
            lent = lend(slot.stage, self._skips).writes if slot.op is Op.F and slot.micro_batch == 0 else ()
            writes = [
                (value, self._placement[value.stage], self._costs.nbytes(value) / self._costs.bytes_per_second)
                for value in (*one.writes, *lent)
            ]
            found = self._known[slot] = _Known(self._costs.seconds(one), one.reads, writes)
        return found
