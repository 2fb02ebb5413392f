"""Linear layers with what follows them in one kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .autocast import lowered
from .checks import check_input
from .declare import Derivative, declare


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    inside = output[1]
    ctx.mark_non_differentiable(inside)
    ctx.save_for_backward(x, weight, inside)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, inside = ctx.saved_tensors
    slope = torch.ops.aten.gelu_backward(grad, inside)
    rows = slope.reshape(math.prod(slope.shape[:-1]), slope.shape[-1])
    grad_weight = rows.t() @ x.reshape(rows.shape[0], x.shape[-1])
    return slope @ weight, grad_weight, rows.sum(0, dtype=torch.float32).to(weight.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], weight.shape[0])


_linear_gelu = declare(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    fake=_fake,
    derivative=Derivative(_save, _differentiate),
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``gelu(x @ weight.T + bias)``, the first half of a transformer's feed-forward part.

    The fused kernel (backend ``cutlass``, taken only when chosen) writes the result and, for the backward pass, the sum
    before the GELU: two passes over the result's memory less than a product, a bias and a GELU by themselves.

    Args:
        x: ``[..., k]``; float32, bfloat16 or float16.
        weight: ``[n, k]``, of the same data type.
        bias: ``[n]``, of the same data type.

    Returns:
        ``[..., n]``.

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If shapes, data types or devices do not fit.

    Example:
        >>> linear_gelu(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1))
        tensor([[1.9545]])
    """
    check_input("x", x)
    x, weight, bias = lowered(x, weight, bias)
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"x, weight and bias must be [..., k], [n, k] and [n]; got {tuple(x.shape)}, {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"x, weight and bias must be of one data type; got {x.dtype}, {weight.dtype} and {bias.dtype}")
    result: Tensor = _linear_gelu(x, weight, bias)[0]
    return result
