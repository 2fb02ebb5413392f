"""Activations after a bias, native: one pass over memory forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import address, format_of, rows_and_columns

if TYPE_CHECKING:
    from ..._native import Kernels


def bias_gelu(kernels: Kernels, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return ``gelu(x + bias)``; see :func:`ds_kernels.ops.bias_gelu`. Reads ``x`` and writes the result once."""
    out = torch.empty_like(x)
    kernels.bias_gelu(
        address("x", x),
        address("bias", bias),
        out.data_ptr(),
        *rows_and_columns(x),
        format_of(x),
        approximate == "tanh",
        torch.get_num_threads(),
    )
    return out


def bias_gelu_backward(
    kernels: Kernels, grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``; the latter is empty where there is no bias.

    Reads ``grad`` and ``x`` and writes the gradient of ``x`` once. The gradient of ``bias`` is summed in float32 before
    anything is rounded, in an order that depends on the shape alone (``csrc/row_blocks.h``).
    """
    grad_x = torch.empty_like(x)
    grad_bias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    kernels.bias_gelu_backward(
        address("grad", grad),
        address("x", x),
        address("bias", bias),
        grad_x.data_ptr(),
        grad_bias.data_ptr(),
        *rows_and_columns(x),
        format_of(x),
        approximate == "tanh",
        torch.get_num_threads(),
    )
    return grad_x, grad_bias


def bias_swiglu(kernels: Kernels, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``silu(gate) * value``; see :func:`ds_kernels.ops.bias_swiglu`. Reads ``x`` and writes the result once."""
    rows, columns = rows_and_columns(x)
    out = x.new_empty(*x.shape[:-1], columns // 2)
    kernels.bias_swiglu(
        address("x", x),
        address("bias", bias),
        out.data_ptr(),
        rows,
        columns // 2,
        format_of(x),
        torch.get_num_threads(),
    )
    return out


def bias_swiglu_backward(kernels: Kernels, grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``, as :func:`bias_gelu_backward` does."""
    rows, columns = rows_and_columns(x)
    grad_x = torch.empty_like(x)
    grad_bias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    kernels.bias_swiglu_backward(
        address("grad", grad),
        address("x", x),
        address("bias", bias),
        grad_x.data_ptr(),
        grad_bias.data_ptr(),
        rows,
        columns // 2,
        format_of(x),
        torch.get_num_threads(),
    )
    return grad_x, grad_bias


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bias_gelu": bias_gelu,
        "bias_gelu_backward": bias_gelu_backward,
        "bias_swiglu": bias_swiglu,
        "bias_swiglu_backward": bias_swiglu_backward,
    }
)
"""By name of the op; the first argument is the native module's kernels."""
