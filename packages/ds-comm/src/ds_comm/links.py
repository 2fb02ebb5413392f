"""What a message costs, as a line through measured times: a latency, and bytes by a bandwidth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

SIZES = tuple(1 << power for power in range(6, 27, 2))
"""Bytes that a rank sends, 64 B to 64 MiB."""
ROUNDS = 5
"""Calls of each size that are timed."""
_SETTLING = 2  # calls before the first is timed


class Sample(NamedTuple):
    """How long messages of one size took."""

    nbytes: int
    """Bytes that each rank sent."""
    seconds: float
    """Median over rounds of the slowest rank's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCost:
    """Latency and bandwidth of a way to communicate.

    Raises:
        ValueError: ``latency`` is negative or not finite, or ``bandwidth`` not positive.

    Example:
        >>> LinkCost(latency=1e-4, bandwidth=1e9).seconds(1_000_000)
        0.0011
    """

    latency: float
    """Seconds of a message without contents."""
    bandwidth: float
    """Bytes per second that each rank sends; infinite where larger messages took no longer."""

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"latency must be finite and not negative, in seconds; got {self.latency!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, in bytes per second; got {self.bandwidth!r}")

    def seconds(self, nbytes: float) -> float:
        """Return the time of a message."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisLinks:
    """What was measured between the ranks along one axis of the mesh."""

    name: str
    """``within nodes`` or ``across nodes``."""
    ranks: int
    """Ranks of one group along the axis."""
    message: LinkCost
    """One message to one rank, while ranks in pairs do the same."""
    exchange: LinkCost
    """All ranks send to all others at once; by the bytes that one of them sends."""
    samples: tuple[Sample, ...]
    """Times of the exchange, by size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """What was measured between the ranks of a group; the same on all of them."""

    axes: tuple[AxisLinks, ...]
    """From the inside out; axes of one rank are left out."""

    def table(self) -> str:
        """Return a table in Markdown.

        Example:
            >>> cost = LinkCost(latency=2e-5, bandwidth=1.25e8)
            >>> axis = AxisLinks(name="across nodes", ranks=2, message=cost, exchange=cost, samples=())
            >>> print(Links(axes=(axis,)).table())
            | axis | ranks | message | GB/s | exchange | GB/s |
            |---|---|---|---|---|---|
            | across nodes | 2 | 20.0 us | 0.125 | 20.0 us | 0.125 |
        """
        head = ["axis", "ranks", "message", "GB/s", "exchange", "GB/s"]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for axis in self.axes:
            costs = [
                cell
                for cost in (axis.message, axis.exchange)
                for cell in (f"{cost.latency * 1e6:.1f} us", f"{cost.bandwidth / 1e9:.3g}")
            ]
            lines.append(f"| {' | '.join([axis.name, str(axis.ranks), *costs])} |")
        return "\n".join(lines)


def measure(
    call: Callable[[int], object],
    slowest: Callable[[float], float],
    *,
    sizes: Sequence[int] = SIZES,
    limit: float = 0.1,
    rounds: int = ROUNDS,
) -> tuple[Sample, ...]:
    """Time ``call`` in growing sizes. All ranks call it.

    Args:
        call: Sends so many bytes, and returns when as many have arrived.
        slowest: Returns the largest of all ranks' numbers.
        sizes: Bytes, ascending; at least two are measured.
        limit: Seconds of a call after which sizes grow no further.
        rounds: Calls of each size.
    """
    samples: list[Sample] = []
    for nbytes in sizes:
        times = []
        for turn in range(_SETTLING + rounds):
            slowest(0.0)  # all begin together
            start = time.perf_counter()
            call(nbytes)
            took = slowest(time.perf_counter() - start)
            if turn >= _SETTLING:
                times.append(took)
        samples.append(Sample(nbytes, statistics.median(times)))
        if len(samples) > 1 and samples[-1].seconds > limit:
            break
    return tuple(samples)


def fit(samples: Sequence[Sample]) -> LinkCost:
    """Return the line through samples that outliers hardly move.

    The slope is the median of those between all pairs of samples, each weighted by how far apart the sizes are; the
    latency is the median of what the slope leaves, each weighted by the inverse of its time.

    Args:
        samples: Of at least two sizes.

    Raises:
        ValueError: All samples have one size.

    Example:
        >>> times = [(1000, 2e-3), (10_000, 11e-3), (100_000, 101e-3), (50_000, 9.0)]
        >>> cost = fit([Sample(*each) for each in times])
        >>> round(cost.latency, 6), round(cost.bandwidth)
        (0.001, 1000000)

    Reference:
        Sen, Estimates of the Regression Coefficient Based on Kendall's Tau, 1968.
    """
    pairs = [(first, second) for first, second in combinations(samples, 2) if first.nbytes != second.nbytes]
    if not pairs:
        raise ValueError(f"a line needs samples of at least two sizes; got {list(samples)}")
    slopes = [
        ((second.seconds - first.seconds) / (second.nbytes - first.nbytes), abs(second.nbytes - first.nbytes))
        for first, second in pairs
    ]
    slope = max(0.0, _median(slopes))
    latency = _median([(each.seconds - slope * each.nbytes, 1 / max(each.seconds, 1e-9)) for each in samples])
    return LinkCost(latency=max(0.0, latency), bandwidth=1 / slope if slope else math.inf)


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """Return the value below and above which lies half of the weight."""
    half = sum(weight for _, weight in weighted) / 2
    for value, weight in sorted(weighted):
        half -= weight
        if half <= 0:
            return value
    return max(weighted)[0]
