"""Activations after a bias: two passes over memory less than bias, activation and their backward by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        ValueError: If shapes or data types do not fit.

    Example:
        >>> bias_gelu(torch.zeros(2, 3), torch.ones(3))[0, 0]
        tensor(0.8413)

    Reference:
        Dan Hendrycks and Kevin Gimpel, Gaussian Error Linear Units (GELUs), 2016.
    """
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be one {x.dtype} value for each of the {x.shape[-1]} columns of x; got {bias.dtype} of shape "
            f"{tuple(bias.shape)}"
        )
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
    result: Tensor = _bias_gelu(x.contiguous(), None if bias is None else bias.contiguous(), approximate)
    return result
