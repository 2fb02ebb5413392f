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
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, grad_inside: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, inside = ctx.saved_tensors
    slope = grad_inside
    if grad is not None:
        through = torch.ops.aten.gelu_backward(grad, inside)
        slope = through if slope is None else slope + through
    return (None, None, None) if slope is None else _through_linear(slope, x, weight)


def _through_linear(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    return grad @ weight, *_of_parameters(grad, x, weight)


def _of_parameters(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    grad_weight = rows.t() @ x.reshape(rows.shape[0], x.shape[-1])
    return grad_weight, rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(weight.dtype)


def _save_after(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, inside, weight, _ = inputs
    ctx.save_for_backward(hidden, inside, weight)


def _differentiate_after(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, inside, weight = ctx.saved_tensors
    grad = grad.contiguous()
    return None, _linear_dgelu(grad, weight, inside), *_of_parameters(grad, hidden, weight)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], weight.shape[0])


_linear_gelu = declare(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    fake=_fake,
    derivative=Derivative(_save, _differentiate),
)
_linear_after_gelu = declare(
    "linear_after_gelu",
    "(Tensor hidden, Tensor inside, Tensor weight, Tensor bias) -> Tensor",
    fake=lambda hidden, inside, weight, bias: hidden.new_empty(*hidden.shape[:-1], weight.shape[0]),
    derivative=Derivative(_save_after, _differentiate_after),
)


_linear_dgelu = declare(
    "linear_dgelu",
    "(Tensor grad, Tensor weight, Tensor inside) -> Tensor",
    fake=lambda grad, weight, inside: torch.empty_like(inside),
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
    return _checked(x, weight, bias)[0]


def gelu_mlp(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    """Return ``gelu(x @ weight_in.T + bias_in) @ weight_out.T + bias_out``, a transformer's feed-forward part.

    Backward, the gradient before the GELU comes from one kernel (backend ``cutlass``, taken only when chosen), the
    product with ``weight_out`` and in its epilogue the slope: the gradient behind the GELU is never written nor read.
    Kept for the backward pass are what is inside the GELU and its result, as in torch.

    Args:
        x: ``[..., k]``; float32, bfloat16 or float16.
        weight_in: ``[n, k]``, of the same data type, as all that follow.
        bias_in: ``[n]``.
        weight_out: ``[m, n]``.
        bias_out: ``[m]``.

    Returns:
        ``[..., m]``.

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If shapes, data types or devices do not fit.

    Example:
        >>> gelu_mlp(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1), torch.ones(3, 1), torch.zeros(3))
        tensor([[1.9545, 1.9545, 1.9545]])
    """
    hidden, inside = _checked(x, weight_in, bias_in)
    _, weight, bias = lowered(hidden, weight_out, bias_out)
    _check_layer("the GELU's result, weight_out and bias_out", hidden, weight, bias)
    result: Tensor = _linear_after_gelu(hidden, inside, weight, bias)
    return result


def _checked(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the GELU and what is inside."""
    check_input("x", x)
    x, weight, bias = lowered(x, weight, bias)
    _check_layer("x, weight and bias", x, weight, bias)
    result: tuple[Tensor, Tensor] = _linear_gelu(x, weight, bias)
    return result


def _check_layer(names: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names} must be [..., k], [n, k] and [n]; got {tuple(x.shape)}, {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"{names} must be of one data type; got {x.dtype}, {weight.dtype} and {bias.dtype}")
