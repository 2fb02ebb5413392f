"""Global gradient norm: the same bits on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .flat import Flat
from .kernels import tree_root

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, ShardKernels


class GradNorm(NamedTuple):
    """Norm of the mean gradient."""

    value: float  # L2, over all parameters; not finite when any gradient is not
    culprit: str | None  # first parameter whose gradient is not finite


def grad_norm(flats: Sequence[Flat], scale: float, *, comm: Collectives, kernels: ShardKernels) -> GradNorm:
    """Return the L2 norm of ``scale`` times the reduced gradients of ``flats``.

    One small message per rank: 8 bytes for each 64 to 4,096 gradient elements (see [Note: Norm tree]).

    Args:
        flats: Trained flats, in the same order on every rank.
        scale: Factor on the sums, for a mean.
        comm: The ranks that hold the shards.
        kernels: Sums of squares.
    """
    rows = []
    for flat in flats:
        if flat.gradient is not None:
            rows.append(kernels.chunk_sumsq(flat.gradient.reduced(), flat.layout.granule))
    if not rows:
        return GradNorm(0.0, None)
    gathered = comm.gather_rows(torch.cat(rows))
    chunks = _in_layout_order(gathered, [row.numel() for row in rows])
    squared = tree_root(_padded(chunks))
    total = math.fsum(squared.tolist())
    if math.isfinite(total):
        return GradNorm(math.sqrt(total) * scale, None)
    return GradNorm(total, _first_not_finite(flats, chunks))


def _in_layout_order(gathered: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Split ``[ranks, sum(widths)]`` into one vector per flat, ordered by position in the flat."""
    return [columns.reshape(-1) for columns in gathered.split(list(widths), dim=1)]


def _padded(chunks: Sequence[Tensor]) -> Tensor:
    """Stack vectors into rows of one power-of-two width; zeros at the end change no tree."""
    width = 1 << (max(chunk.numel() for chunk in chunks) - 1).bit_length()
    rows = chunks[0].new_zeros(len(chunks), width)
    for row, chunk in zip(rows, chunks, strict=True):
        row[: chunk.numel()] = chunk
    return rows


def _first_not_finite(flats: Sequence[Flat], chunks: Sequence[Tensor]) -> str | None:
    for flat, chunk in zip(flats, chunks, strict=True):
        bad = torch.nonzero(~torch.isfinite(chunk))
        if bad.numel():
            start = int(bad[0]) * flat.layout.granule
            names = [overlap.slot.name for overlap in flat.layout.overlaps(start, start + flat.layout.granule)]
            return " or ".join(names)
    return None
