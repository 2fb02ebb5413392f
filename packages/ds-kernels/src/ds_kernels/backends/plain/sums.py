"""Sums of squares along a fixed tree, in plain torch: what they mean."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import SQUARE_BLOCK, check_chunk_sumsq


@torch.no_grad()
def chunk_sumsq(x: Tensor, chunk: int) -> Tensor:
    """Return the float64 sums of squares of the consecutive chunks of ``x``; see :meth:`ReferenceBackend.chunk_sumsq`.

    [Note: Square tree]
    Leaves are blocks of 64 elements. T(blocks) = T(first half) + T(second half) for an even number of
    blocks, and T(all but the last) + last for an odd one. Inside a block, element i meets element i + 32,
    then the sums meet sums 16, 8, 4, 2 and 1 apart: an order that vector units like.
    """
    check_chunk_sumsq(x, chunk)
    sums = x.view(x.numel() // SQUARE_BLOCK, SQUARE_BLOCK).double().square_()
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return tree_of_rows(sums.view(x.numel() // chunk, chunk // SQUARE_BLOCK))


def tree_of_rows(rows: Tensor) -> Tensor:
    """Add up each row; see [Note: Square tree]."""
    num_rows, blocks = rows.shape
    if blocks == 1:
        return rows[:, 0]
    if blocks % 2:
        return tree_of_rows(rows[:, :-1]) + rows[:, -1]
    halves = tree_of_rows(rows.reshape(2 * num_rows, blocks // 2)).view(num_rows, 2)
    return halves[:, 0] + halves[:, 1]
