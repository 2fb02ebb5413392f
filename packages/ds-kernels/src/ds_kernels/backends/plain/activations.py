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
    rows = grad_x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    grad_bias = x.new_empty(0) if bias is None else rows.sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_bias


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"bias_gelu": bias_gelu, "bias_gelu_backward": bias_gelu_backward}
)
"""By name of the op."""
