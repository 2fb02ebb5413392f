"""Dropout after a bias and before a residual on the GPU: one pass over memory each way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checks import check_device
from ..dropout_key import dropout_terms
from .kernel import FORMATS, Kernel
from .launcher import Launcher
from .tiles import TILE_THREADS, rows_and_columns, tiles


class DropoutKey(ctypes.Structure):
    """``DropoutKey`` of ``cuda/philox.cuh``; the seed is read on the GPU, so that nothing waits for it."""

    _fields_ = (("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("scale", ctypes.c_float))


class _BiasDropoutArgs(ctypes.Structure):
    """``BiasDropoutArgs`` of ``cuda/bias_dropout.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias", "residual", "out", "bias_grad")),
        *((name, ctypes.c_uint64) for name in ("rows", "columns", "slab")),
        ("key", DropoutKey),
    )


def bias_dropout_kernel(dtype: torch.dtype, *, backward: bool) -> Kernel:
    """Return the kernel for one data type."""
    types = f"{FORMATS[dtype]}, {str(backward).lower()}"
    return Kernel("bias_dropout.cuh", "BiasDropoutArgs", f"bias_dropout<{types}>", TILE_THREADS)


def key(p: float, seed: Tensor | None) -> DropoutKey:
    """Return the key as kernels take it."""
    return DropoutKey(None if seed is None else seed.data_ptr(), *dropout_terms(p, seed))


def bias_dropout_residual(  # noqa: PLR0917 - the op's schema
    launch: Launcher, x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    """Return ``residual + dropout(x + bias)``; see :func:`ds_kernels.ops.bias_dropout_residual`."""
    check_device("nvrtc", launch.device_type, "x", x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    held = [None if t is None else t.contiguous() for t in (x, bias, residual)]
    kernel = bias_dropout_kernel(x.dtype, backward=False)
    _run(launch, kernel, [*held, out, None], x, key(p, seed))
    return out


def bias_dropout_residual_backward(
    launch: Launcher,
    grad: Tensor,
    has_bias: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` (empty without seed: it is ``grad``) and of the bias (empty without bias)."""
    check_device("nvrtc", launch.device_type, "grad", grad)
    held = grad.contiguous()
    grad_x = grad.new_empty(0) if seed is None else torch.empty_like(held)
    (_, slabs), _ = tiles(*rows_and_columns(grad))
    sums = torch.zeros(slabs if has_bias else 0, grad.shape[-1], dtype=torch.float32, device=grad.device)
    tensors = held, None, None, None if seed is None else grad_x, sums if has_bias else None
    if has_bias or seed is not None:
        _run(launch, bias_dropout_kernel(grad.dtype, backward=True), tensors, grad, key(p, seed))
    return grad_x, sums.sum(0).to(grad.dtype) if has_bias else grad.new_empty(0)


def _run(
    launch: Launcher, kernel: Kernel, tensors: Sequence[Tensor | None], like: Tensor, dropout_key: DropoutKey
) -> None:
    rows, columns = rows_and_columns(like)
    blocks, slab = tiles(rows, columns)
    if like.numel():
        addresses = (None if t is None else t.data_ptr() for t in tensors)
        launch(kernel, like.device, blocks, _BiasDropoutArgs(*addresses, rows, columns, slab, dropout_key))


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bias_dropout_residual": bias_dropout_residual,
        "bias_dropout_residual_backward": bias_dropout_residual_backward,
    }
)
"""By name of the op; the first argument is the launcher."""
