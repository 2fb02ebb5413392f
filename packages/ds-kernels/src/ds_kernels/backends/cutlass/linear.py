"""A linear layer with its GELU in one kernel: the product is never written without its bias."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..checks import check_device
from ..nvrtc.kernel import Kernel
from ..nvrtc.launcher import Launcher
from ..plain import linear as plain
from .hopper import Hopper

ELEMENTS: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.bfloat16: "cutlass::bfloat16_t", torch.float16: "cutlass::half_t"}
)
"""Data types the kernel takes, and their names in CUTLASS."""

_TILE = 128
_ALIGN = 8
_SHARED = 64 * 1024


class _LinearGeluArgs(ctypes.Structure):
    """``LinearGeluArgs`` of ``cuda/linear_gelu.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "inside")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "inner")),
    )


def linear_gelu_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel for one data type."""
    function = f"linear_gelu<{ELEMENTS[dtype]}>"
    return Kernel("linear_gelu.cuh", "LinearGeluArgs", function, 128, _SHARED, ("cutlass", "cudart", "cccl"))


def linear_gelu(
    launch: Launcher, hopper: Hopper | None, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``gelu(x @ weight.T + bias)`` and what is inside; see :func:`ds_kernels.ops.linear_gelu`.

    On Hopper by the kernel for it, where that was built, else by the one that serves all GPUs. Rows of 16-byte units
    are needed: where the weight has a number of rows or columns that is no multiple of 8, or a tensor starts off a
    16-byte boundary, this is the plain computation.
    """
    check_device("cutlass", launch.device_type, "x", x)
    columns, inner = weight.shape
    rows = x.numel() // inner if inner else 0
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (x, weight, bias))
    if not (rows and columns and aligned) or columns % _ALIGN or inner % _ALIGN or rows * max(columns, inner) >= 2**31:
        return plain.linear_gelu(x, weight, bias)
    out, inside = (x.new_empty(*x.shape[:-1], columns) for _ in range(2))
    if hopper is not None and hopper.serves(x.device):
        hopper.linear_gelu(hopper.place(x.device), (x, weight, bias, out, inside))
        return out, inside
    pointers = (tensor.data_ptr() for tensor in (x, weight, bias, out, inside))
    args = _LinearGeluArgs(*pointers, rows, columns, inner)
    launch(linear_gelu_kernel(x.dtype), x.device, swizzled(-(-rows // _TILE), -(-columns // _TILE)), args)
    return out, inside


def swizzled(tiles_down: int, tiles_across: int) -> tuple[int, int]:
    """Return the grid of ``GemmIdentityThreadblockSwizzle<8>``: tiles that share operands run near each other.

    Example:
        >>> swizzled(10, 6), swizzled(10, 1)
        ((80, 1), (10, 1))
    """
    together = 8 if tiles_across >= 6 else 4 if tiles_across >= 3 else 2 if tiles_across >= 2 else 1
    return tiles_down * together, -(-tiles_across // together)
