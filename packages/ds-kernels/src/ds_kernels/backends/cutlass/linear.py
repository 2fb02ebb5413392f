"""A linear layer and the GELU before or behind it in one kernel: the product alone is never written."""

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


class _LinearDGeluArgs(ctypes.Structure):
    """``LinearDGeluArgs`` of ``cuda/linear_dgelu.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "weight", "inside", "out")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "inner")),
    )


def linear_gelu_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel of :func:`linear_gelu` for one data type."""
    function = f"linear_gelu<{ELEMENTS[dtype]}>"
    return Kernel("linear_gelu.cuh", "LinearGeluArgs", function, 128, _SHARED, ("cutlass", "cudart", "cccl"))


def linear_dgelu_kernel(dtype: torch.dtype) -> Kernel:
    """Return the kernel of :func:`linear_dgelu` for one data type."""
    function = f"linear_dgelu<{ELEMENTS[dtype]}>"
    return Kernel("linear_dgelu.cuh", "LinearDGeluArgs", function, 128, _SHARED, ("cutlass", "cudart", "cccl"))


def linear_gelu(
    launch: Launcher, hopper: Hopper | None, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``gelu(x @ weight.T + bias)`` and what is inside; see :func:`ds_kernels.ops.linear_gelu`.

    On Hopper by the kernel for it, where that was built, else by the one that serves all GPUs; plainly where
    :func:`_fits` says no.
    """
    check_device("cutlass", launch.device_type, "x", x)
    columns, inner = weight.shape
    rows = x.numel() // inner if inner else 0
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    if not _fits((rows, columns, inner), (x, weight, bias)):
        return plain.linear_gelu(x, weight, bias)
    out, inside = (x.new_empty(*x.shape[:-1], columns) for _ in range(2))
    if hopper is not None and hopper.serves(x.device):
        hopper.linear_gelu(hopper.place(x.device), (x, weight, bias, out, inside))
        return out, inside
    pointers = (tensor.data_ptr() for tensor in (x, weight, bias, out, inside))
    args = _LinearGeluArgs(*pointers, rows, columns, inner)
    launch(linear_gelu_kernel(x.dtype), x.device, swizzled(-(-rows // _TILE), -(-columns // _TILE)), args)
    return out, inside


def linear_dgelu(launch: Launcher, hopper: Hopper | None, grad: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """Return ``(grad @ weight) * gelu'(inside)``; see :func:`ds_kernels.ops.gelu_mlp`.

    By the kernels that :func:`linear_gelu` would take.
    """
    check_device("cutlass", launch.device_type, "grad", grad)
    inner, columns = weight.shape
    rows = grad.numel() // inner if inner else 0
    grad, weight, inside = grad.contiguous(), weight.contiguous(), inside.contiguous()
    if not _fits((rows, columns, inner), (grad, weight, inside)):
        return plain.linear_dgelu(grad, weight, inside)
    out = torch.empty_like(inside)
    if hopper is not None and hopper.serves(grad.device):
        hopper.linear_dgelu(hopper.place(grad.device), (grad, weight, inside, out))
        return out
    pointers = (tensor.data_ptr() for tensor in (grad, weight, inside, out))
    args = _LinearDGeluArgs(*pointers, rows, columns, inner)
    launch(linear_dgelu_kernel(grad.dtype), grad.device, swizzled(-(-rows // _TILE), -(-columns // _TILE)), args)
    return out


def _fits(sizes: tuple[int, int, int], tensors: tuple[Tensor, ...]) -> bool:
    """Whether there is something to compute, rows are whole 16-byte units, and tensors begin at 16-byte boundaries."""
    rows, columns, inner = sizes
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    whole = columns % _ALIGN == 0 and inner % _ALIGN == 0 and rows * max(columns, inner) < 2**31
    return min(sizes) > 0 and aligned and whole


def swizzled(tiles_down: int, tiles_across: int) -> tuple[int, int]:
    """Return the grid of ``GemmIdentityThreadblockSwizzle<8>``: tiles that share operands run near each other.

    Example:
        >>> swizzled(10, 6), swizzled(10, 1)
        ((80, 1), (10, 1))
    """
    together = 8 if tiles_across >= 6 else 4 if tiles_across >= 3 else 2 if tiles_across >= 2 else 1
    return tiles_down * together, -(-tiles_across // together)
