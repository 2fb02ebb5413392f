"""Where each parameter of a unit stands in its flat buffer, and where the buffer is cut into shards.

[Note: Flat layout]
All parameters of one data type in one unit lie in one 1D buffer of ``length = num_shards * shard_numel`` elements;
rank r's shard is the interval ``[r * shard_numel, (r + 1) * shard_numel)``. Offsets do not depend on the number of
shards: what lies behind the last parameter is padding. ``shard_numel`` is a multiple of ``granule``, a power of two
of at least :data:`LEAF` elements, so that a shard boundary never cuts a block of the gradient norm
(see [Note: Norm tree]) and every shard is aligned for vector units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

LEAF = 64
"""Elements of the smallest block a shard boundary respects, and of a leaf of the norm tree."""

_ALIGN = 32
"""Parameters start at multiples of this many elements: 64 bytes in bfloat16, a cache line."""

_MAX_GRANULE = 4096
_MAX_PADDING = 0.01


class Spec(NamedTuple):
    """A parameter to be laid out."""

    name: str
    shape: torch.Size
    group: int  # optimizer parameter group; parameters of one group are contiguous in the buffer


class Slot(NamedTuple):
    """A parameter in the buffer."""

    name: str
    shape: torch.Size
    group: int
    offset: int
    numel: int

    @property
    def end(self) -> int:
        """First element behind the parameter."""
        return self.offset + self.numel


class Overlap(NamedTuple):
    """What an interval of the buffer holds of one parameter."""

    slot: Slot
    start: int  # first element, counted from the start of the parameter
    offset: int  # the same element, counted from the start of the interval
    numel: int


class Span(NamedTuple):
    """An interval of the buffer in which the optimizer sees one parameter."""

    group: int
    start: int
    end: int
    name: str  # of the parameter; of a whole group, of its first


@dataclass(frozen=True, slots=True)
class Layout:
    """See [Note: Flat layout].

    Example:
        >>> layout = plan([Spec("w", torch.Size([100]), 0), Spec("b", torch.Size([10]), 0)], num_shards=2)
        >>> [slot.offset for slot in layout.slots], layout.shard_numel, layout.length
        ([0, 128], 128, 256)
    """

    slots: tuple[Slot, ...]
    num_shards: int
    granule: int
    shard_numel: int

    @property
    def used(self) -> int:
        """Elements up to the end of the last parameter."""
        return max((slot.end for slot in self.slots), default=0)

    @property
    def length(self) -> int:
        """Elements of the whole buffer."""
        return self.num_shards * self.shard_numel

    @property
    def padding(self) -> int:
        """Elements that belong to no parameter."""
        return self.length - sum(slot.numel for slot in self.slots)

    def shard_of(self, rank: int) -> tuple[int, int]:
        """Return the interval ``[start, end)`` of ``rank``."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def cut(self, num_parts: int, index: int) -> tuple[int, int]:
        """Return interval ``index`` of ``num_parts`` equal ones, which divide the number of shards."""
        numel = self.length // num_parts
        return index * numel, (index + 1) * numel

    def overlaps(self, start: int, end: int) -> Iterator[Overlap]:
        """Yield what the interval ``[start, end)`` holds of each parameter; zero-sized ones never appear."""
        for slot in self.slots:
            first, last = max(start, slot.offset), min(end, slot.end)
            if first < last:
                yield Overlap(slot, first - slot.offset, first - start, last - first)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield the intervals that belong to no parameter, in order."""
        position = 0
        for slot in self.slots:
            if slot.offset > position:
                yield position, slot.offset
            position = max(position, slot.end)
        if position < self.length:
            yield position, self.length

    def group_ranges(self) -> dict[int, tuple[int, int]]:
        """Return, per parameter group, the interval that holds all its parameters and no other's."""
        ranges: dict[int, tuple[int, int]] = {}
        for slot in self.slots:
            start, _ = ranges.get(slot.group, (slot.offset, slot.offset))
            ranges[slot.group] = (start, slot.end)
        return ranges

    def spans(self, per_tensor: Collection[int]) -> Iterator[Span]:
        """Yield what the optimizer sees as parameters: a whole group, or each tensor of the groups ``per_tensor``."""
        for group, (start, end) in sorted(self.group_ranges().items()):
            if group not in per_tensor:
                yield Span(group, start, end, next(slot.name for slot in self.slots if slot.group == group))
            else:
                yield from (Span(group, slot.offset, slot.end, slot.name) for slot in self.slots if slot.group == group)


def plan(specs: Sequence[Spec], num_shards: int) -> Layout:
    """Lay ``specs`` out for ``num_shards`` ranks.

    Args:
        specs: Parameters in model order; they are reordered by group, stably.
        num_shards: Number of ranks, at least 1.

    Returns:
        The layout. Its padding is below 1 % plus one granule per shard.
    """
    slots, position = [], 0
    for spec in sorted(specs, key=lambda spec: spec.group):
        slots.append(Slot(spec.name, spec.shape, spec.group, position, spec.shape.numel()))
        position = _round_up(slots[-1].end, _ALIGN)
    granule = _granule(position, num_shards)
    shard_numel = max(granule, _round_up(-(-position // num_shards), granule))
    return Layout(tuple(slots), num_shards, granule, shard_numel)


def _granule(used: int, num_shards: int) -> int:
    """Return the largest granule whose padding stays in bounds: large ones make the norm's messages small."""
    granule = _MAX_GRANULE
    while granule > LEAF and granule * num_shards > _MAX_PADDING * used:
        granule //= 2
    return granule


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
