"""Activations after a bias: two passes over memory less than bias, activation and their backward by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import matched
from .checks import check_input, check_vectors
from .declare import Derivative, declare


def _save_bias_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _differentiate_bias_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad.contiguous(), x, bias, ctx.approximate)
    return grad_x, None if bias is None else grad_bias, None


def _fake_bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


_bias_gelu = declare(
    "bias_gelu",
    "(Tensor x, Tensor? bias, str approximate) -> Tensor",
    fake=lambda x, bias, approximate: torch.empty_like(x),
    derivative=Derivative(_save_bias_gelu, _differentiate_bias_gelu),
)
_bias_gelu_backward = declare(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    fake=_fake_bias_gelu_backward,
)


def _save_bias_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_bias_swiglu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_swiglu_backward(grad.contiguous(), x, bias)
    return grad_x, None if bias is None else grad_bias


def _fake_bias_swiglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


_bias_swiglu = declare(
    "bias_swiglu",
    "(Tensor x, Tensor? bias) -> Tensor",
    fake=lambda x, bias: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    derivative=Derivative(_save_bias_swiglu, _differentiate_bias_swiglu),
)
_bias_swiglu_backward = declare(
    "bias_swiglu_backward",
    "(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    fake=_fake_bias_swiglu_backward,
)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Return ``gelu(x + bias)`` in one pass over memory; the backward pass is one, too.

    The pre-activation is computed again in the backward pass: only ``x`` and ``bias`` are kept. In float32 8 bytes are
    moved for each element forward and 12 backward, where bias and gelu by themselves move 16 and 16 and keep the sum.

    Args:
        x: ``[..., n]``, contiguous; float32, bfloat16 or float16.
        bias: ``[n]``, of the same data type; None: no bias.
        approximate: ``none`` (erf) or ``tanh``, as in ``torch.nn.functional.gelu``.

    Returns:
        Like ``x``.

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If shapes, data types or devices do not fit.

    Example:
        >>> bias_gelu(torch.zeros(2, 3), torch.ones(3))[0, 0]
        tensor(0.8413)

    Reference:
        Dan Hendrycks and Kevin Gimpel, Gaussian Error Linear Units (GELUs), 2016.
    """
    x, bias = _checked(x, bias)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
    result: Tensor = _bias_gelu(x, bias, approximate)
    return result


def bias_swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * value`` in one pass over memory; the backward pass is one, too.

    ``x + bias`` is the gate, then the value: the two halves of the last dimension. Only ``x`` and ``bias`` are kept. In
    float32 12 bytes are moved for each element of the result forward and 20 backward, where bias, silu and product by
    themselves move 36 and 60 and keep three tensors of its size.

    Args:
        x: ``[..., 2n]``, contiguous; float32, bfloat16 or float16.
        bias: ``[2n]``, of the same data type; None: no bias.

    Returns:
        ``[..., n]``.

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If shapes, data types or devices do not fit.

    Example:
        >>> bias_swiglu(torch.tensor([[0.0, 1.0, 5.0, 5.0]]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
        tensor([[0.0000, 4.3864]])

    Reference:
        Noam Shazeer, GLU Variants Improve Transformer, 2020.
    """
    x, bias = _checked(x, bias)
    if x.shape[-1] % 2:
        raise ValueError(
            f"x must have gate and value, an even number of columns, in its last dimension; got shape {tuple(x.shape)}"
        )
    result: Tensor = _bias_swiglu(x, bias)
    return result


def _checked(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_input("x", x)
    (bias,) = matched(x, bias)
    check_vectors(x, {"bias": bias})
    return x.contiguous(), None if bias is None else bias.contiguous()
