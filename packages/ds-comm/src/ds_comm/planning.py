"""Which code each buffer is sent in, so that a step takes as long as it may and loses as little as it can.

[Note: Plans]
A buffer sent in fewer bits saves time and loses squares of the gradient. Of the codes of one buffer only those count
that lose least for what they save: the corners of the convex curve of losses over time. Steps from one corner to the
next, of all buffers, are taken in the order of squares lost by second saved, until the time is as wanted. So the plan
for a link that is slower, or for less time, goes further on the same way: no buffer is coded less. Its loss is at most
that of the best plan plus that of the last step taken.

Times add up: nothing is assumed to overlap. What coding costs is counted once, as soon as one buffer is coded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from .links import LinkCost

EXACT = "exact"
CODES = (EXACT, "bf16", "int8", "int4", "ternary")
"""What a plan chooses from, from most bytes to fewest."""

_ROUNDING = 1e-9  # of sums of times


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A buffer that is reduced once in each step."""

    name: str
    """For reports."""
    link: LinkCost
    """What its exchange costs."""
    nbytes: Mapping[str, int]
    """Bytes that a rank sends, by code; ``exact`` among them."""
    lost: Mapping[str, float]
    """Squares of the gradient that a code loses, on average over ranks; that of ``exact`` is 0."""
    squares: float
    """Those of the whole gradient, likewise."""

    def seconds(self, code: str) -> float:
        """Return the time of the exchange."""
        return self.link.seconds(self.nbytes[code])


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Time a step may take, and what it takes beside its exchanges."""

    target: float
    """Seconds that the step may take."""
    rest: float
    """Seconds without exchanges."""
    coding: float = 0.0
    """Seconds of coding and decoding, if anything is coded."""
    max_error: float = 1.0
    """Largest part of a buffer's squares that a code may lose; what loses all of them is never chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was chosen, and what is expected of it."""

    codes: tuple[str, ...]
    """Of each buffer."""
    seconds: float
    """Of a step."""
    met: bool
    """Whether that is within the target."""
    nbytes: int
    """Bytes that a rank sends in a step."""
    exact_nbytes: int
    """What that would be if all were exact."""
    error: float
    """Part of the gradient's squares that codes lose in a step."""


class _Move(NamedTuple):
    price: float  # squares lost by second saved
    bucket: int
    code: str
    saved: float  # seconds


def plan(buckets: Sequence[Bucket], budget: Budget) -> Plan:
    """Choose codes; see [Note: Plans]. Pure.

    If the target cannot be met, the fastest plan is returned.

    Example:
        >>> link = LinkCost(latency=0.0, bandwidth=1e6)
        >>> nbytes = {"exact": 4_000_000, "bf16": 2_000_000, "int8": 1_020_000}
        >>> bucket = Bucket(name="0", link=link, nbytes=nbytes, lost={"bf16": 1e-6, "int8": 1e-4}, squares=1.0)
        >>> [plan([bucket], Budget(target=target, rest=0.5)).codes for target in (5.0, 3.0, 1.0)]
        [('exact',), ('bf16',), ('int8',)]
    """
    codes = [EXACT] * len(buckets)
    exact = budget.rest + math.fsum(bucket.seconds(EXACT) for bucket in buckets)
    seconds = exact
    if exact > budget.target:
        moves = sorted(chain.from_iterable(_moves(index, bucket, budget) for index, bucket in enumerate(buckets)))
        seconds += budget.coding
        for move in moves:
            if seconds <= budget.target:
                break
            codes[move.bucket] = move.code
            seconds -= move.saved
        if seconds > budget.target and seconds >= exact:  # coding takes longer than it saves
            codes = [EXACT] * len(buckets)
    return evaluated(buckets, codes, budget)


def evaluated(buckets: Sequence[Bucket], codes: Sequence[str], budget: Budget) -> Plan:
    """Return what is expected of ``codes``, one for each bucket."""
    chosen = list(zip(buckets, codes, strict=True))
    coding = budget.coding if any(code != EXACT for code in codes) else 0.0
    seconds = budget.rest + coding + math.fsum(bucket.seconds(code) for bucket, code in chosen)
    squares = math.fsum(bucket.squares for bucket in buckets)
    lost = math.fsum(bucket.lost[code] for bucket, code in chosen if code != EXACT)
    return Plan(
        codes=tuple(codes),
        seconds=seconds,
        met=seconds <= budget.target * (1 + _ROUNDING),
        nbytes=sum(bucket.nbytes[code] for bucket, code in chosen),
        exact_nbytes=sum(bucket.nbytes[EXACT] for bucket in buckets),
        error=lost / squares if squares else 0.0,
    )


def _moves(index: int, bucket: Bucket, budget: Budget) -> list[_Move]:
    """Return the steps from exact to the shortest code, along the convex curve."""
    limit = budget.max_error * bucket.squares
    allowed = [
        code
        for code, lost in bucket.lost.items()
        if code in bucket.nbytes and lost <= limit and (lost < bucket.squares or not lost)
    ]
    moves: list[_Move] = []
    at = EXACT
    while True:
        lost = bucket.lost[at] if at != EXACT else 0.0
        options = []
        for code in allowed:
            saved = (bucket.nbytes[at] - bucket.nbytes[code]) / bucket.link.bandwidth
            if saved > 0:
                options.append((max(0.0, bucket.lost[code] - lost) / saved, -saved, code))
        if not options:
            return moves
        price, saved, at = min(options)
        # a price below the last one is rounding, or a code that loses nothing more
        price = max(price, moves[-1].price) if moves else price
        moves.append(_Move(price, index, at, -saved))
