"""One parameter's part of partitioned vectors: this rank's interval of it, and the whole of it on every rank.

[Note: Intervals]
A parameter's elements stand at ``[slot.offset, slot.end)`` of its flat; rank r holds those in its shard, one interval,
often an empty one. The whole is gathered in rounds, each of which fills at most ``_ROUND`` elements of rows: each rank
sends its part of the round in a row as wide as the widest part. So a rank holds the whole tensor and one round's rows.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .layout import Layout, Slot
from .memory import byte_view

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

_ROUND = 1 << 20


class Interval(NamedTuple):
    """What this rank holds of a parameter."""

    start: int  # first element, in the row-major flattened parameter
    data: Tensor  # 1D, a view of live memory; empty if it holds nothing


def own_interval(layout: Layout, slot: Slot, vector: Tensor, first: int, rank: int) -> Interval:
    """Return the part of ``vector``, which begins at ``first`` in the layout, that belongs to ``slot`` and ``rank``."""
    begin, end = _overlap(layout, slot.offset, slot.end, rank)
    begin, end = max(begin, first), min(end, first + vector.numel())
    if begin >= end:
        return Interval(0, vector[:0])
    return Interval(begin - slot.offset, vector[begin - first : end - first])


def gathered(layout: Layout, slot: Slot, own: Interval, comm: Collectives) -> Tensor:
    """Return the whole of ``slot`` (1D) from every rank's interval of it; all ranks call it. See [Note: Intervals]."""
    whole = own.data.new_empty(slot.numel)
    step = max(_ROUND // comm.size, 1)
    for begin in range(slot.offset, slot.end, step):
        parts = [_overlap(layout, begin, min(begin + step, slot.end), rank) for rank in range(comm.size)]
        row = whole.new_zeros(max(last - first for first, last in parts))
        first, last = (position - slot.offset - own.start for position in parts[comm.rank])
        row[: max(last - first, 0)] = own.data[max(first, 0) : max(last, 0)]
        for (first, last), values in zip(parts, comm.gather_rows(row), strict=True):
            whole[first - slot.offset : last - slot.offset] = values[: last - first]
    return whole


def from_rank(tensor: Tensor, rank: int, comm: Collectives) -> None:
    """Overwrite ``tensor`` (contiguous) with that of ``rank``; all ranks call it.

    From rank 0 it is a broadcast; from another one every rank sends as much, and rank's part is taken.
    """
    if rank == 0:
        comm.broadcast(tensor)
        return
    flat = tensor.view(-1)
    for part in flat.split(max(_ROUND // comm.size, 1)):
        part.copy_(comm.gather_rows(part)[rank])


def agreed(flags: list[bool], comm: Collectives, device: torch.device) -> list[list[bool]]:
    """Return every rank's ``flags``, which are equally many on all of them; all ranks call it."""
    rows = comm.gather_rows(torch.tensor([float(flag) for flag in flags], device=device))
    return [[bool(flag) for flag in row] for row in rows.tolist()]


def same_on_all(value: Tensor, comm: Collectives, device: torch.device) -> bool:
    """Return whether all ranks have the same ``value``, bit for bit; all ranks call it."""
    digest = hashlib.blake2b(byte_view(value.detach().cpu().contiguous()), digest_size=8).digest()
    rows = comm.gather_rows(torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device))
    return bool((rows == rows[0]).all())


def _overlap(layout: Layout, begin: int, end: int, rank: int) -> tuple[int, int]:
    """Return what of ``[begin, end)`` lies in the rank's shard; as ``(begin, begin)`` where nothing does."""
    first, last = layout.shard_of(rank)
    first, last = max(begin, first), min(end, last)
    return (first, last) if first < last else (begin, begin)
