"""Block codes on the GPU: one pass over memory, the bytes of every other backend. See [Note: Payload]."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checks import check_device, mark_written
from ..payload import MAX_BLOCK, Layout, check_decode, check_encode
from .kernel import FORMATS, Kernel
from .launcher import Launcher

_CODES: Mapping[str, str] = MappingProxyType({"sign": "Sign", "ternary": "Ternary", "int4": "Int<4>", "int8": "Int<8>"})
_THREADS = 128  # kCodecThreads of cuda/block_codec.cuh
_TEAMS = _THREADS // 16  # kTeams: blocks that one block of threads codes
ROOMS = (256, MAX_BLOCK)
"""Most elements of a block, by kernel: what shared memory holds."""


class _EncodeArgs(ctypes.Structure):
    """``EncodeArgs`` of ``cuda/block_codec.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "error", "payload")),
        ("numel", ctypes.c_uint64),
        ("block", ctypes.c_uint),
    )


class _DecodeArgs(ctypes.Structure):
    """``DecodeArgs``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "payload")),
        ("numel", ctypes.c_uint64),
        ("block", ctypes.c_uint),
        ("weight", ctypes.c_float),
    )


def encode_kernel(x: torch.dtype, layout: Layout) -> Kernel:
    """Return the encoder for one data type, code and type of the scales."""
    return Kernel("block_codec.cuh", "EncodeArgs", f"block_encode<{_types(x, layout)}>", _THREADS)


def decode_kernel(out: torch.dtype, layout: Layout, *, accumulate: bool) -> Kernel:
    """Return the decoder, or that which adds to what is there."""
    types = f"{_types(out, layout)}, {str(accumulate).lower()}"
    return Kernel("block_codec.cuh", "DecodeArgs", f"block_decode<{types}>", _THREADS)


def block_encode(launch: Launcher, x: Tensor, error: Tensor | None, payload: Tensor, layout: Layout) -> None:
    """Code ``x + error`` into ``payload``; ``error`` becomes what the payload lacks. Meaning as in plain torch.

    Moves 4 bytes for each float32 element, 12 with an error, and the payload.
    """
    check_encode(x, error, payload, layout)
    check_device("nvrtc", launch.device_type, "x", x)
    if x.numel():
        at = None if error is None else error.data_ptr()
        args = _EncodeArgs(x.data_ptr(), at, payload.data_ptr(), x.numel(), layout.block)
        launch(encode_kernel(x.dtype, layout), x.device, _grid(x, layout), args)
    mark_written(payload, error)


def block_decode(launch: Launcher, out: Tensor, payload: Tensor, layout: Layout) -> None:
    """Write what ``payload`` stands for into ``out``. Meaning as in plain torch."""
    check_decode(out, payload, layout)
    _decode(launch, decode_kernel(out.dtype, layout, accumulate=False), (out, payload), layout, 1.0)


def block_accumulate(launch: Launcher, out: Tensor, payload: Tensor, layout: Layout, weight: float) -> None:
    """Add ``weight`` times what ``payload`` stands for to ``out``. Meaning as in plain torch."""
    check_decode(out, payload, layout, (torch.float32,))
    _decode(launch, decode_kernel(out.dtype, layout, accumulate=True), (out, payload), layout, weight)


def _decode(launch: Launcher, kernel: Kernel, tensors: tuple[Tensor, Tensor], layout: Layout, weight: float) -> None:
    out, payload = tensors
    check_device("nvrtc", launch.device_type, "out", out)
    if out.numel():
        args = _DecodeArgs(out.data_ptr(), payload.data_ptr(), out.numel(), layout.block, weight)
        launch(kernel, out.device, _grid(out, layout), args)
    mark_written(out)


def _types(dtype: torch.dtype, layout: Layout) -> str:
    room = min(room for room in ROOMS if layout.block <= room)
    return f"{_CODES[layout.code]}, {FORMATS[dtype]}, {FORMATS[layout.scale_dtype]}, {room}"


def _grid(x: Tensor, layout: Layout) -> tuple[int, int]:
    return -(-x.numel() // (layout.block * _TEAMS)), 1


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"block_encode": block_encode, "block_decode": block_decode, "block_accumulate": block_accumulate}
)
"""By name of the op; the first argument is the launcher."""
