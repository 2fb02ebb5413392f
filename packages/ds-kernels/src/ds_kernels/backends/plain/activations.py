"""Activations after a bias, in plain torch: what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return ``gelu(x + bias)``; see :func:`ds_kernels.ops.bias_gelu`."""
    return functional.gelu(x if bias is None else x + bias, approximate=approximate)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``; the latter is empty where there is no bias."""
    inside = x if bias is None else x + bias
    grad_x = torch.ops.aten.gelu_backward(grad, inside, approximate=approximate)
    return grad_x, x.new_empty(0) if bias is None else _over_rows(grad_x, bias)


def bias_swiglu(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``silu(gate) * value``; see :func:`ds_kernels.ops.bias_swiglu`."""
    gate, value = _halves(x, bias)
    return functional.silu(gate) * value


def bias_swiglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``bias``; the latter is empty where there is no bias."""
    gate, value = _halves(x, bias)
    grad_x = torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * functional.silu(gate)], -1)
    return grad_x, x.new_empty(0) if bias is None else _over_rows(grad_x, bias)


def _halves(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    inside, half = x if bias is None else x + bias, x.shape[-1] // 2
    return inside[..., :half], inside[..., half:]


def _over_rows(grad: Tensor, bias: Tensor) -> Tensor:
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(bias.dtype)


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bias_gelu": bias_gelu,
        "bias_gelu_backward": bias_gelu_backward,
        "bias_swiglu": bias_swiglu,
        "bias_swiglu_backward": bias_swiglu_backward,
    }
)
"""By name of the op."""
