"""Attention scores as kernels take them: ``[batch, heads, queries, keys]``, and a mask with strides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """What scores are made of."""

    batch: int
    heads: int
    queries: int
    keys: int


class Mask(NamedTuple):
    """A mask in which keys are neighbours."""

    tensor: Tensor  # holds the memory
    strides: tuple[int, int, int]  # of batch, heads and queries, in elements; 0 where it is broadcast


def rows_of(scores: Tensor) -> Rows:
    """Return the four sizes; those that are not there are 1.

    Example:
        >>> import torch
        >>> rows_of(torch.empty(3, 5, 7))
        Rows(batch=1, heads=3, queries=5, keys=7)
    """
    return Rows(*(1,) * (4 - scores.dim()), *scores.shape)


def mask_of(mask: Tensor, rows: Rows) -> Mask:
    """Return the mask, broadcast to ``rows`` without a copy, unless it is one value for all keys."""
    if mask.shape[-1] != rows.keys or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], rows.keys).contiguous()
    batch, heads, queries, _ = mask.expand(rows).stride()
    return Mask(mask, (batch, heads, queries))
