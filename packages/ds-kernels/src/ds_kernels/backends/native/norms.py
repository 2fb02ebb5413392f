"""Norms of rows after an addition, native: one pass over memory forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import address, format_of, rows_and_columns

if TYPE_CHECKING:
    from ..._native import Kernels


def layer_norm(  # noqa: PLR0917 - the op's schema
    kernels: Kernels, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's mean and 1 / deviation."""
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    out, total, scale = _norm(kernels, x, residual, weight, bias, mean, eps)
    return out, total, mean, scale


def layer_norm_backward(  # noqa: PLR0917 - the op's schema
    kernels: Kernels,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, of the weight and of the bias; the latter two are empty without weight."""
    grad_bias = x.new_empty(0) if weight is None else torch.empty_like(weight)
    grad_x, grad_weight = _norm_backward(kernels, grad, grad_sum, x, weight, mean, scale, grad_bias)
    return grad_x, grad_weight, grad_bias


def rms_norm(
    kernels: Kernels, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized rows, ``x + residual`` (empty without residual), and each row's 1 / root mean square."""
    return _norm(kernels, x, residual, weight, None, None, eps)


def rms_norm_backward(  # noqa: PLR0917 - the op's schema
    kernels: Kernels, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of the weight; the latter is empty without weight."""
    return _norm_backward(kernels, grad, grad_sum, x, weight, None, scale, None)


def _norm(  # noqa: PLR0917 - the op's schema
    kernels: Kernels,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    kernels.norm(
        (address("x", x), address("residual", residual), address("weight", weight), address("bias", bias)),
        (out.data_ptr(), total.data_ptr(), address("mean", mean), scale.data_ptr()),
        rows_and_columns(x),
        eps,
        format_of(x),
        mean is not None,
        torch.get_num_threads(),
    )
    return out, total, scale


def _norm_backward(  # noqa: PLR0917 - the op's schema
    kernels: Kernels,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    scale: Tensor,
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    grads = address("grad", grad), address("grad_sum", grad_sum)
    kernels.norm_backward(
        (*grads, address("x", x), address("weight", weight), address("mean", mean), address("scale", scale)),
        (grad_x.data_ptr(), grad_weight.data_ptr(), address("grad_bias", grad_bias)),
        rows_and_columns(x),
        format_of(x),
        mean is not None,
        torch.get_num_threads(),
    )
    return grad_x, grad_weight


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "layer_norm": layer_norm,
        "layer_norm_backward": layer_norm_backward,
        "rms_norm": rms_norm,
        "rms_norm_backward": rms_norm_backward,
    }
)
"""By name of the op; the first argument is the native module's kernels."""
