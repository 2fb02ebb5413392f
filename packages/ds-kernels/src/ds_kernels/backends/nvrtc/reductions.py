"""Sums along fixed trees on the GPU, with the bits of the cpu backend."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checks import SQUARE_BLOCK, check_chunk_sumsq, check_device, check_tree_sum, mark_written
from ..plain.sums import tree_of_rows
from .kernel import FORMATS, PACKET, Kernel
from .launcher import Launcher

_THREADS = 256
_SQUARE_THREADS = 128  # kSquareThreads of cuda/chunk_sumsq.cuh
_MAX_LEAVES = 1024  # kMaxLeaves: what shared memory has room for
_MAX_PIECES = 8  # kMaxPieces of cuda/tree_sum.cuh


class _TreeSumArgs(ctypes.Structure):
    """``TreeSumArgs`` of ``cuda/tree_sum.cuh``."""

    _fields_ = (
        ("pieces", ctypes.c_void_p * _MAX_PIECES),
        ("out", ctypes.c_void_p),
        ("numel", ctypes.c_uint64),
        ("num_pieces", ctypes.c_int),
    )


class _ChunkSumsqArgs(ctypes.Structure):
    """``ChunkSumsqArgs`` of ``cuda/chunk_sumsq.cuh``."""

    _fields_ = (("x", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("leaves", ctypes.c_uint))


def tree_sum_kernel(piece: torch.dtype, out: torch.dtype) -> Kernel:
    """Return the sum for one combination of data types."""
    return Kernel("tree_sum.cuh", "TreeSumArgs", f"tree_sum<{FORMATS[piece]}, {FORMATS[out]}>", _THREADS)


def chunk_sumsq_kernel(x: torch.dtype) -> Kernel:
    """Return the sum of squares for one data type."""
    return Kernel("chunk_sumsq.cuh", "ChunkSumsqArgs", f"chunk_sumsq<{FORMATS[x]}>", _SQUARE_THREADS)


def tree_sum(launch: Launcher, out: Tensor, pieces: Sequence[Tensor]) -> None:
    """Sum ``pieces`` in float32 along a binary tree over their order, rounding once into ``out``.

    Up to eight pieces are one pass over memory; of more, each eight become a float32 partial sum first.
    """
    check_tree_sum(out, pieces)
    check_device("nvrtc", launch.device_type, "out", out)
    if out.numel() == 0:
        return
    while len(pieces) > _MAX_PIECES:
        groups = [pieces[first : first + _MAX_PIECES] for first in range(0, len(pieces), _MAX_PIECES)]
        partials = [torch.empty(out.numel(), dtype=torch.float32, device=out.device) for _ in groups]
        for partial, group in zip(partials, groups):
            _sum_up_to_eight(launch, partial, group)
        pieces = partials
    _sum_up_to_eight(launch, out, pieces)
    mark_written(out)


def _sum_up_to_eight(launch: Launcher, out: Tensor, pieces: Sequence[Tensor]) -> None:
    addresses = (ctypes.c_void_p * _MAX_PIECES)(*(piece.data_ptr() for piece in pieces))
    args = _TreeSumArgs(addresses, out.data_ptr(), out.numel(), len(pieces))
    blocks = -(-out.numel() // (PACKET * _THREADS)), 1
    launch(tree_sum_kernel(pieces[0].dtype, out.dtype), out.device, blocks, args)


def chunk_sumsq(launch: Launcher, x: Tensor, chunk: int) -> Tensor:
    """Return the float64 sums of squares of the consecutive chunks of ``x``, reading ``x`` once.

    The tree is that of [Note: Square tree]. A kernel sums up to 65,536 elements; longer chunks are summed in parts,
    and the parts, a 64th or less of the volume, along the rest of the tree.
    """
    check_chunk_sumsq(x, chunk)
    check_device("nvrtc", launch.device_type, "x", x)
    part = chunk
    while part > _MAX_LEAVES * SQUARE_BLOCK and part % (2 * SQUARE_BLOCK) == 0:
        part //= 2
    if part > _MAX_LEAVES * SQUARE_BLOCK:  # an odd number of leaves: its tree is a leaf at a time
        part = SQUARE_BLOCK
    sums = torch.empty(x.numel() // part, dtype=torch.float64, device=x.device)
    if sums.numel():
        args = _ChunkSumsqArgs(x.data_ptr(), sums.data_ptr(), part // SQUARE_BLOCK)
        launch(chunk_sumsq_kernel(x.dtype), x.device, (sums.numel(), 1), args)
    return tree_of_rows(sums.view(x.numel() // chunk, chunk // part))


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType({"tree_sum": tree_sum, "chunk_sumsq": chunk_sumsq})
"""By name of the op; the first argument is the launcher."""
