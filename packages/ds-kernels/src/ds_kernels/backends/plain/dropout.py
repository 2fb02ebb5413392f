"""Dropout after a bias and before a residual, in plain torch: what it means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..dropout_key import dropout_terms
from .philox import element_numbers
from .precision import widened


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return ``x``, elements dropped by their numbers set to 0 and the others scaled; see [Note: Element numbers]."""
    terms = dropout_terms(p, seed)
    if seed is None or terms.threshold == 0:
        return x
    kept = element_numbers(seed, x.numel()).view(x.shape) >= terms.threshold
    return torch.where(kept, x * terms.scale, 0.0)


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return ``residual + dropout(x + bias)``; see :func:`ds_kernels.ops.bias_dropout_residual`."""
    wide = widened(x) if bias is None else widened(x) + widened(bias)
    return (widened(residual) + dropped(wide, p, seed)).to(x.dtype)


def bias_dropout_residual_backward(
    grad: Tensor,
    has_bias: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` (empty without seed: it is ``grad``) and of the bias (empty without bias)."""
    wide = dropped(widened(grad), p, seed)
    rows = wide.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    grad_bias = rows.sum(0).to(grad.dtype) if has_bias else grad.new_empty(0)
    return grad.new_empty(0) if seed is None else wide.to(grad.dtype, copy=True), grad_bias


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bias_dropout_residual": bias_dropout_residual,
        "bias_dropout_residual_backward": bias_dropout_residual_backward,
    }
)
"""By name of the op."""
