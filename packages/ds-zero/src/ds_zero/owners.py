"""Which rank steps which whole tensor, and which slices travel for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .layout import Layout, Slot


class Owned(NamedTuple):
    """A tensor that one rank steps whole."""

    flat: int  # index among the flats with a gradient
    slot: Slot
    owner: int


class Slice(NamedTuple):
    """What a shard holds of a tensor."""

    tensor: int  # index among the owned tensors, the same on every rank
    start: int  # first element, in the flattened tensor
    numel: int


def balance(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Give each item to a rank so that the largest total cost is small: dearest first, to whom has least so far.

    The largest total is at most 4/3 of the best possible.

    Example:
        >>> balance([1, 5, 3, 3], 2)
        [0, 0, 1, 1]

    Reference:
        R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969.
    """
    owners = [0] * len(costs)
    loads = [0] * num_ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        owners[item] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners


def inside(slot: Slot, interval: tuple[int, int]) -> bool:
    """Whether the interval holds all of a tensor."""
    return interval[0] <= slot.offset and slot.end <= interval[1]


def slices_between(
    tensors: Sequence[Owned], layouts: Sequence[Layout], num_ranks: int, *, holder: int, owner: int
) -> list[Slice]:
    """Return what rank ``holder`` of ``num_ranks`` holds of the tensors of rank ``owner``, in an order both know.

    A tensor that the owner holds as a whole has no slices: it is stepped where it is.
    """
    found = []
    for index, tensor in enumerate(tensors):
        layout = layouts[tensor.flat]
        if tensor.owner != owner or inside(tensor.slot, layout.cut(num_ranks, owner)):
            continue
        start, end = layout.cut(num_ranks, holder)
        first, last = max(start, tensor.slot.offset), min(end, tensor.slot.end)
        if first < last:
            found.append(Slice(index, first - tensor.slot.offset, last - first))
    return found
