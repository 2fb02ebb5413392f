"""Dropout after a bias and before a residual, native: one pass over memory forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dropout_key import dropout_terms
from .arguments import address, format_of, rows_and_columns

if TYPE_CHECKING:
    from ..._native import Kernels


def key(p: float, seed: Tensor | None) -> tuple[int, int, float]:
    """Return seed, threshold and scale as the native module takes them."""
    return 0 if seed is None else int(seed) % (1 << 64), *dropout_terms(p, seed)


def bias_dropout_residual(  # noqa: PLR0917 - the op's schema
    kernels: Kernels, x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    """Return ``residual + dropout(x + bias)``; see :func:`ds_kernels.ops.bias_dropout_residual`."""
    out = torch.empty_like(x)
    kernels.bias_dropout(
        (address("x", x), address("bias", bias), address("residual", residual), out.data_ptr()),
        rows_and_columns(x),
        key(p, seed),
        format_of(x),
        torch.get_num_threads(),
    )
    return out


def bias_dropout_residual_backward(
    kernels: Kernels,
    grad: Tensor,
    has_bias: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` (empty without seed: it is ``grad``) and of the bias (empty without bias).

    The gradient of the bias is summed in float32, in an order that depends on the shape alone (``csrc/row_blocks.h``).
    """
    grad_x = grad.new_empty(0) if seed is None else torch.empty_like(grad)
    grad_bias = grad.new_empty(grad.shape[-1] if has_bias else 0)
    if has_bias or seed is not None:
        kernels.bias_dropout_backward(
            (address("grad", grad), 0 if seed is None else grad_x.data_ptr(), grad_bias.data_ptr()),
            rows_and_columns(grad),
            key(p, seed),
            format_of(grad),
            torch.get_num_threads(),
        )
    return grad_x, grad_bias


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bias_dropout_residual": bias_dropout_residual,
        "bias_dropout_residual_backward": bias_dropout_residual_backward,
    }
)
"""By name of the op; the first argument is the native module's kernels."""
