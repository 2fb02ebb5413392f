"""Softmax of masked attention scores and dropout on the GPU: one pass over memory each way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..attention_shape import mask_of, rows_of
from ..checks import check_device
from .dropout import DropoutKey, key
from .kernel import FORMATS, Kernel
from .launcher import Launcher
from .tiles import row_threads


class _SoftmaxArgs(ctypes.Structure):
    """``SoftmaxArgs`` of ``cuda/softmax.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "mask", "out", "dropped")),
        *((name, ctypes.c_uint64) for name in ("heads", "queries", "keys")),
        ("mask_strides", ctypes.c_uint64 * 3),
        ("key", DropoutKey),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int),
    )


class _SoftmaxBackwardArgs(ctypes.Structure):
    """``SoftmaxBackwardArgs``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "probabilities", "out")),
        ("keys", ctypes.c_uint64),
        ("key", DropoutKey),
        ("scale", ctypes.c_float),
    )


def softmax_kernel(dtype: torch.dtype, *, threads: int, backward: bool) -> Kernel:
    """Return the kernel for one data type and size of a block."""
    function, struct = ("softmax_backward", "SoftmaxBackwardArgs") if backward else ("softmax", "SoftmaxArgs")
    return Kernel("softmax.cuh", struct, f"{function}<{FORMATS[dtype]}, {threads}>", threads)


def masked_softmax_dropout(  # noqa: PLR0917 - the op's schema
    launch: Launcher,
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the probabilities after dropout, and before it (empty without seed: the same).

    See :func:`ds_kernels.ops.masked_softmax_dropout`.
    """
    check_device("nvrtc", launch.device_type, "scores", scores)
    held, rows = scores.contiguous(), rows_of(scores)
    probabilities = torch.empty_like(held)
    dropped = scores.new_empty(0) if seed is None else torch.empty_like(held)
    broadcast = None if mask is None else mask_of(mask, rows)
    if scores.numel():
        args = _SoftmaxArgs(
            held.data_ptr(),
            None if broadcast is None else broadcast.tensor.data_ptr(),
            probabilities.data_ptr(),
            None if seed is None else dropped.data_ptr(),
            *rows[1:],
            (0, 0, 0) if broadcast is None else broadcast.strides,
            key(p, seed),
            scale,
            causal,
        )
        kernel = softmax_kernel(scores.dtype, threads=row_threads(rows.keys), backward=False)
        launch(kernel, scores.device, (scores.numel() // rows.keys, 1), args)
    return (probabilities, dropped) if seed is None else (dropped, probabilities)


def masked_softmax_dropout_backward(  # noqa: PLR0917 - the op's schema
    launch: Launcher,
    grad: Tensor,
    probabilities: Tensor,
    scale: float,
    causal: bool,  # noqa: FBT001 - the op's schema; what lies ahead has the probability 0
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the gradient of the scores."""
    check_device("nvrtc", launch.device_type, "grad", grad)
    held, inputs = grad.contiguous(), probabilities.contiguous()
    out, keys = torch.empty_like(held), grad.shape[-1]
    if grad.numel():
        pointers = held.data_ptr(), inputs.data_ptr(), out.data_ptr()
        kernel = softmax_kernel(grad.dtype, threads=row_threads(keys), backward=True)
        args = _SoftmaxBackwardArgs(*pointers, keys, key(p, seed), scale)
        launch(kernel, grad.device, (grad.numel() // keys, 1), args)
    return out


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "masked_softmax_dropout": masked_softmax_dropout,
        "masked_softmax_dropout_backward": masked_softmax_dropout_backward,
    }
)
"""By name of the op; the first argument is the launcher."""
