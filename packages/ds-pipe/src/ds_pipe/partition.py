"""Where to cut a row of layers into stages, so that the largest stage is as small as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def uniform(num_layers: int, num_parts: int) -> list[int]:
    """Return the bounds of parts that differ by at most one layer; the first ones are the larger.

    Raises:
        ValueError: More parts than layers.

    Example:
        >>> uniform(7, 3)
        [0, 3, 5, 7]
    """
    _check(num_layers, num_parts)
    size, larger = divmod(num_layers, num_parts)
    return [part * size + min(part, larger) for part in range(num_parts + 1)]


def balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Return the bounds of parts whose largest sum is the least possible; each part has a layer.

    Of the cuts that have that sum, the one whose sums have the least squares; of those, the one with the latest cuts.
    Takes about ``len(weights) ** 2`` additions.

    Args:
        weights: Of each layer, not negative.
        num_parts: Parts.

    Raises:
        ValueError: More parts than layers, or a weight that is negative or not finite.

    Example:
        >>> balanced([5, 1, 1, 1, 4], 3)
        [0, 1, 4, 5]
    """
    _check(len(weights), num_parts)
    wrong = [(index, weight) for index, weight in enumerate(weights) if not (weight >= 0 and math.isfinite(weight))]
    if wrong:
        raise ValueError(f"a layer's weight is finite and not negative; got {wrong[0][1]} for layer {wrong[0][0]}")
    if not any(weights):
        return uniform(len(weights), num_parts)
    sums = [0.0, *accumulate(map(float, weights))]
    largest = _cut(sums, num_parts, math.inf, worst=True)[0]
    return _cut(sums, num_parts, largest, worst=False)[1]


def _cut(sums: Sequence[float], num_parts: int, limit: float, *, worst: bool) -> tuple[float, list[int]]:
    """Return the least cost and its bounds; the cost is the largest part, or the sum of the parts' squares.

    Args:
        sums: Of the first 0, 1, 2, ... weights.
        num_parts: Parts.
        limit: No part may be larger.
        worst: Which cost.
    """
    count = len(sums) - 1
    best = [0.0, *[math.inf] * count]  # by number of layers
    cuts: list[list[int]] = []
    for part in range(1, num_parts + 1):
        now, cut = [math.inf] * (count + 1), [0] * (count + 1)
        for end in range(part, count + 1):
            for start in range(end - 1, part - 2, -1):
                size = sums[end] - sums[start]
                if size > limit or (size if worst else size * size) > now[end]:
                    break  # and longer ones are larger still
                cost = max(best[start], size) if worst else best[start] + size * size
                if cost < now[end]:
                    now[end], cut[end] = cost, start
        best = now
        cuts.append(cut)
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return best[count], bounds[::-1]


def _check(num_layers: int, num_parts: int) -> None:
    if not 1 <= num_parts <= num_layers:
        raise ValueError(
            f"each stage needs a layer: {num_layers} layers make 1 ... {num_layers} stages; got {num_parts}"
        )
