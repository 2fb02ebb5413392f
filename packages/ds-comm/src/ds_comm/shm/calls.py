"""What the native module is told of a collective: numbers, addresses and sizes, after tensors have been checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Call: TypeAlias = tuple[int, int, int, int]
"""Verb, format of elements, reduction, root: what all ranks have to agree on."""


class Verb(IntEnum):
    """A collective; named in messages, see ``csrc/shm/channel.cpp``."""

    ALL_GATHER = 0
    BROADCAST = 1
    GATHER = 2
    BARRIER = 3
    ALL_TO_ALL = 4
    SCATTER = 5
    ALL_REDUCE = 6
    REDUCE = 7
    REDUCE_SCATTER = 8


# the order of csrc/shm/fold_table.h
_REDUCED = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_FLOATING = frozenset(_REDUCED[:4])
_MOVED = (*_REDUCED, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64)
_FORMATS = {dtype: number for number, dtype in enumerate(_MOVED)}
_OTHER = len(_MOVED)  # moved as bytes
_REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
_BITWISE = frozenset(_REDUCTIONS[5:])


def moving(verb: Verb, tensor: Tensor, root: int = -1) -> Call:
    """Return the call that moves elements like ``tensor``'s."""
    return verb, _FORMATS.get(tensor.dtype, _OTHER), -1, root


def reducing(verb: Verb, tensor: Tensor, op: dist.ReduceOp, root: int = -1) -> Call:
    """Return the call that reduces elements like ``tensor``'s.

    Raises:
        ValueError: The reduction is not defined for the data type.
    """
    name = str(op.op).rpartition(".")[2]  # type: ignore[attr-defined]  # torch's stubs lack it
    if tensor.dtype not in _REDUCED:
        raise ValueError(f"ds_shm reduces {', '.join(map(str, _REDUCED))}; got a tensor of {tensor.dtype}")
    if name not in _REDUCTIONS:
        raise ValueError(f"ds_shm reduces by {', '.join(_REDUCTIONS)}; got {name}")
    floating = tensor.dtype in _FLOATING
    if (name == "AVG" and not floating) or (name in _BITWISE and floating):
        kind = "floating-point" if name == "AVG" else "integer or bool"
        raise ValueError(f"ReduceOp.{name} needs {kind} tensors; got {tensor.dtype}")
    return verb, _FORMATS[tensor.dtype], _REDUCTIONS.index(name), root


def checked(tensors: Iterable[Tensor]) -> None:
    """Check that the memory of ``tensors`` is what a collective may read and write.

    Raises:
        RuntimeError: One is not on CPU.
        ValueError: One is not dense or not contiguous.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"No backend type associated with device type {tensor.device.type}: ds_shm moves tensors on CPU; "
                "make a group with another backend for the others"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"ds_shm moves dense tensors; got one of layout {tensor.layout}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"Tensors must be contiguous; got one of shape {tuple(tensor.shape)} with strides {tensor.stride()}: "
                "pass tensor.contiguous()"
            )


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return where the elements of each tensor lie."""
    return [tensor.data_ptr() for tensor in tensors]


def sizes(tensors: Iterable[Tensor]) -> list[int]:
    """Return the bytes of each tensor."""
    return [tensor.nbytes for tensor in tensors]


def split(tensor: Tensor, rows: Sequence[int], size: int, name: str) -> tuple[list[int], list[int]]:
    """Return addresses and bytes of the parts of ``tensor`` along its first dimension, one for each of ``size`` ranks.

    Args:
        tensor: Contiguous.
        rows: Of each part; empty: all parts are equal.
        size: Number of parts.
        name: What the tensor is, in messages.

    Raises:
        ValueError: The parts do not make up the tensor.
    """
    total = tensor.shape[0] if tensor.dim() else 1
    if not rows:
        if total % size:
            raise ValueError(f"Tensor's dim 0 does not divide equally across group size: {total} rows, {size} ranks")
        rows = [total // size] * size
    if len(rows) != size or sum(rows) != total:
        raise ValueError(
            f"Split sizes doesn't match total dim 0 size: {name} has {total} rows for {size} ranks; got splits {rows}"
        )
    row_bytes = tensor.nbytes // total if total else 0
    starts, at = [], tensor.data_ptr()
    for count in rows:
        starts.append(at)
        at += count * row_bytes
    return starts, [count * row_bytes for count in rows]
