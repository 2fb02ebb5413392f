"""What compression owes to gradients, as pieces of a checkpoint.

[Note: Owed gradients]
Compression with error feedback keeps, on every rank, what its codes have lacked. All that will ever be sent depends on
the sum of that over ranks, to rounding. So each rank saves its shard of the sum, under the role ``gradient_error``, and
after loading owes it to its own shard, on any number of ranks. With nodes each level keeps errors of its own; those of
a node's ranks belong to the sum over nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import state

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, CompressedCollectives, StateSource

    from .flat import Flat
    from .mesh import Mesh
    from .state import Piece

ROLE = "gradient_error"


def pieces(flats: Sequence[Flat], wire: Mesh, across: Collectives) -> Iterator[Piece]:
    """Yield this rank's part of the sum. All ranks call it, to the end; without compression it does nothing.

    Args:
        flats: The trained ones.
        wire: Whose errors.
        across: Exact collectives between nodes.
    """
    owed = _summed(wire.compressed, across)
    for flat in flats:
        if flat.key in owed:
            yield from state.interval_pieces(flat, ROLE, owed[flat.key], flat.own[0])


def load(flats: Sequence[Flat], wire: Mesh, source: StateSource) -> None:
    """Owe what ``source`` says, and nothing else."""
    if not wire.compressed:
        return
    held = source.shapes_of(ROLE) if ROLE in source.roles else {}
    owed: dict[int, Tensor] = {}
    for flat in flats:
        for overlap in flat.layout.overlaps(*flat.own):
            if overlap.slot.name in held:
                shard = owed.setdefault(flat.key, flat.master.new_zeros(flat.layout.shard_numel, dtype=torch.float32))
                part = shard[overlap.offset : overlap.offset + overlap.numel]
                source.read(ROLE, overlap.slot.name, overlap.start, part)
    *within, outermost = wire.compressed
    for level in within:
        level.load_state({})
    outermost.load_state(owed)


def _summed(levels: Sequence[CompressedCollectives], across: Collectives) -> dict[int, Tensor]:
    """Return by key this rank's shard of the sum over ranks and levels."""
    if not levels:
        return {}
    *within, outermost = levels
    owed = dict(outermost.state())
    for level in within:
        for key, interval in sorted(level.state().items()):
            shard = interval.new_empty(interval.numel() // across.size)
            across.reduce_scatter(shard, interval, key=key).wait()
            owed[key] = owed[key].add_(shard) if key in owed else shard
    return owed
