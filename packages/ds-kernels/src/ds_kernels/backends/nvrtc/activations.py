"""Activations after a bias on the GPU: one pass over memory each way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checks import check_device
from .kernel import FORMATS, Kernel
from .launcher import Launcher
from .tiles import TILE_THREADS, rows_and_columns, tiles

_GELU = MappingProxyType({"none": "Erf", "tanh": "Tanh"})


class _Args(ctypes.Structure):
    """``BiasGeluArgs`` of ``cuda/bias_gelu.cuh`` and ``BiasSwigluArgs`` of ``cuda/bias_swiglu.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "x", "bias", "out", "bias_grad")),
        *((name, ctypes.c_uint64) for name in ("rows", "columns", "slab")),
    )


def bias_gelu_kernel(dtype: torch.dtype, approximate: str, *, backward: bool) -> Kernel:
    """Return the kernel for one data type and form of GELU."""
    types = FORMATS[dtype], _GELU[approximate], str(backward).lower()
    return Kernel("bias_gelu.cuh", "BiasGeluArgs", f"bias_gelu<{', '.join(types)}>", TILE_THREADS)


def bias_swiglu_kernel(dtype: torch.dtype, *, backward: bool) -> Kernel:
    """Return the kernel for one data type."""
    types = f"{FORMATS[dtype]}, {str(backward).lower()}"
    return Kernel("bias_swiglu.cuh", "BiasSwigluArgs", f"bias_swiglu<{types}>", TILE_THREADS)


def bias_gelu(launch: Launcher, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return ``gelu(x + bias)``; see :func:`ds_kernels.ops.bias_gelu`."""
    check_device("nvrtc", launch.device_type, "x", x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = rows_and_columns(out)
    _run(launch, bias_gelu_kernel(x.dtype, approximate, backward=False), (None, x, bias), out, shape)
    return out


def bias_gelu_backward(
    launch: Launcher, grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``; the latter is empty where there is no bias."""
    check_device("nvrtc", launch.device_type, "x", x)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel = bias_gelu_kernel(x.dtype, approximate, backward=True)
    partial = _run(launch, kernel, (grad, x, bias), grad_x, rows_and_columns(grad))
    return grad_x, x.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


def bias_swiglu(launch: Launcher, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``silu(gate) * value``; see :func:`ds_kernels.ops.bias_swiglu`."""
    check_device("nvrtc", launch.device_type, "x", x)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _run(launch, bias_swiglu_kernel(x.dtype, backward=False), (None, x, bias), out, rows_and_columns(out))
    return out


def bias_swiglu_backward(launch: Launcher, grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``; the latter is empty where there is no bias."""
    check_device("nvrtc", launch.device_type, "x", x)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel = bias_swiglu_kernel(x.dtype, backward=True)
    partial = _run(launch, kernel, (grad, x, bias), grad_x, rows_and_columns(grad))
    return grad_x, x.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


def _run(
    launch: Launcher,
    kernel: Kernel,
    inputs: tuple[Tensor | None, Tensor, Tensor | None],
    out: Tensor,
    shape: tuple[int, int],
) -> Tensor:
    """Fill ``out``; return the sums over slabs of rows that the bias's gradient is made of: one row for each slab.

    ``shape`` is that of the op's result, in rows and columns.
    """
    grad, x, bias = inputs
    rows, columns = shape
    blocks, slab = tiles(rows, columns)
    slabs = blocks[1] if grad is not None and bias is not None else 0
    partial = torch.zeros(slabs, x.shape[-1] if x.dim() else 1, dtype=torch.float32, device=x.device)
    if out.numel():
        held = [None if t is None else t.contiguous() for t in inputs]
        pointers = (None if t is None else t.data_ptr() for t in (*held, out, partial if slabs else None))
        launch(kernel, x.device, blocks, _Args(*pointers, rows, columns, slab))
    return partial


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bias_gelu": bias_gelu,
        "bias_gelu_backward": bias_gelu_backward,
        "bias_swiglu": bias_swiglu,
        "bias_swiglu_backward": bias_swiglu_backward,
    }
)
"""By name of the op; the first argument is the launcher."""
