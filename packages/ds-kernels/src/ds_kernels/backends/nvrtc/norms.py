"""Norms of rows after an addition on the GPU: one pass over memory forward, two of the inputs backward."""

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
from .tiles import TILE_THREADS, row_threads, rows_and_columns, tiles


class _NormArgs(ctypes.Structure):
    """``NormArgs`` of ``cuda/norm.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "out", "total", "mean", "scale")),
        ("columns", ctypes.c_uint64),
        ("eps", ctypes.c_float),
    )


class _NormBackwardArgs(ctypes.Structure):
    """``NormBackwardArgs``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "grad_sum", "x", "weight", "mean", "scale", "grad_x")),
        ("columns", ctypes.c_uint64),
    )


class _NormWeightsArgs(ctypes.Structure):
    """``NormWeightsArgs``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "x", "mean", "scale", "weight_grad", "bias_grad")),
        *((name, ctypes.c_uint64) for name in ("rows", "columns", "slab")),
    )


def norm_kernel(dtype: torch.dtype, *, layer: bool, threads: int, backward: bool) -> Kernel:
    """Return the kernel over rows, for one data type, kind of norm and size of a block."""
    function, struct = ("norm_backward", "NormBackwardArgs") if backward else ("norm", "NormArgs")
    return Kernel("norm.cuh", struct, f"{function}<{FORMATS[dtype]}, {str(layer).lower()}, {threads}>", threads)


def norm_weights_kernel(dtype: torch.dtype, *, layer: bool) -> Kernel:
    """Return the kernel that sums over rows."""
    types = f"{FORMATS[dtype]}, {str(layer).lower()}"
    return Kernel("norm.cuh", "NormWeightsArgs", f"norm_weights<{types}>", TILE_THREADS)


def layer_norm(  # noqa: PLR0917 - the op's schema
    launch: Launcher, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's mean and 1 / deviation."""
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    out, total, scale = _norm(launch, (x, residual, weight, bias), mean, eps)
    return out, total, mean, scale


def rms_norm(
    launch: Launcher, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's 1 / root mean square."""
    return _norm(launch, (x, residual, weight, None), None, eps)


def layer_norm_backward(  # noqa: PLR0917 - the op's schema
    launch: Launcher,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, of the weight and of the bias; the latter two are empty without weight."""
    return _norm_backward(launch, (grad, grad_sum, x, weight), mean, scale)


def rms_norm_backward(  # noqa: PLR0917 - the op's schema
    launch: Launcher, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of the weight; the latter is empty without weight."""
    return _norm_backward(launch, (grad, grad_sum, x, weight), None, scale)[:2]


def _norm(
    launch: Launcher,
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    mean: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, (residual, weight, bias) = inputs[0].contiguous(), map(_contiguous, inputs[1:])
    check_device("nvrtc", launch.device_type, "x", x)
    rows, columns = rows_and_columns(x)
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows:
        kernel = norm_kernel(x.dtype, layer=mean is not None, threads=row_threads(columns), backward=False)
        pointers = (x, residual, weight, bias, out, None if residual is None else total, mean, scale)
        launch(kernel, x.device, (rows, 1), _NormArgs(*map(_address, pointers), columns, eps))
    return out, total, scale


def _norm_backward(
    launch: Launcher, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None], mean: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = inputs[0].contiguous(), inputs[2].contiguous()
    grad_sum, weight = _contiguous(inputs[1]), _contiguous(inputs[3])
    check_device("nvrtc", launch.device_type, "x", x)
    rows, columns = rows_and_columns(x)
    grad_x, layer = torch.empty_like(x), mean is not None
    if rows:
        kernel = norm_kernel(x.dtype, layer=layer, threads=row_threads(columns), backward=True)
        pointers = map(_address, (grad, grad_sum, x, weight, mean, scale, grad_x))
        launch(kernel, x.device, (rows, 1), _NormBackwardArgs(*pointers, columns))
    if weight is None:
        return grad_x, x.new_empty(0), x.new_empty(0)
    blocks, slab = tiles(rows, columns)
    sums = torch.zeros(2 if layer else 1, blocks[1], columns, dtype=torch.float32, device=x.device)
    if rows:
        pointers = map(_address, (grad, x, mean, scale, sums[0], sums[1] if layer else None))
        args = _NormWeightsArgs(*pointers, rows, columns, slab)
        launch(norm_weights_kernel(x.dtype, layer=layer), x.device, blocks, args)
    grad_weight, *grad_bias = sums.sum(1).to(weight.dtype)
    return grad_x, grad_weight, grad_bias[0] if layer else x.new_empty(0)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "layer_norm": layer_norm,
        "layer_norm_backward": layer_norm_backward,
        "rms_norm": rms_norm,
        "rms_norm_backward": rms_norm_backward,
    }
)
"""By name of the op; the first argument is the launcher."""
