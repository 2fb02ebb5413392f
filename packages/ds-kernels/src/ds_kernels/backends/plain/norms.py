"""Norms of rows after an addition, in plain torch: what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .precision import widened


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's mean and 1 / deviation."""
    total = x if residual is None else x + residual
    wide = widened(total)
    mean = wide.mean(-1)
    centered = wide - mean.unsqueeze(-1)
    scale = (centered.square().mean(-1) + eps).rsqrt()
    out = _affine(centered * scale.unsqueeze(-1), weight, bias)
    return out.to(x.dtype), x.new_empty(0) if residual is None else total, mean, scale


def layer_norm_backward(  # noqa: PLR0917 - the op's schema
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, of the weight and of the bias; the latter two are empty without weight."""
    normalized = (widened(x) - mean.unsqueeze(-1)) * scale.unsqueeze(-1)
    inner = widened(grad) if weight is None else widened(grad) * widened(weight)
    inner = inner - inner.mean(-1, keepdim=True) - normalized * (inner * normalized).mean(-1, keepdim=True)
    grad_x = _joined(inner * scale.unsqueeze(-1), grad_sum).to(x.dtype)
    if weight is None:
        return grad_x, x.new_empty(0), x.new_empty(0)
    return grad_x, _over_rows(widened(grad) * normalized, weight), _over_rows(widened(grad), weight)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's 1 / root mean square."""
    total = x if residual is None else x + residual
    wide = widened(total)
    scale = (wide.square().mean(-1) + eps).rsqrt()
    out = _affine(wide * scale.unsqueeze(-1), weight, None)
    return out.to(x.dtype), x.new_empty(0) if residual is None else total, scale


def rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of the weight; the latter is empty without weight."""
    normalized = widened(x) * scale.unsqueeze(-1)
    inner = widened(grad) if weight is None else widened(grad) * widened(weight)
    inner = inner - normalized * (inner * normalized).mean(-1, keepdim=True)
    grad_x = _joined(inner * scale.unsqueeze(-1), grad_sum).to(x.dtype)
    return grad_x, x.new_empty(0) if weight is None else _over_rows(widened(grad) * normalized, weight)


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normalized if weight is None else normalized * widened(weight)
    return scaled if bias is None else scaled + widened(bias)


def _joined(grad: Tensor, other: Tensor | None) -> Tensor:
    return grad if other is None else grad + widened(other)


def _over_rows(terms: Tensor, like: Tensor) -> Tensor:
    return terms.reshape(math.prod(terms.shape[:-1]), like.numel()).sum(0).to(like.dtype)


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "layer_norm": layer_norm,
        "layer_norm_backward": layer_norm_backward,
        "rms_norm": rms_norm,
        "rms_norm_backward": rms_norm_backward,
    }
)
"""By name of the op."""
