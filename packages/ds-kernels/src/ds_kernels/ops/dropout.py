"""Dropout between a bias and a residual: what a transformer block does after each part, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import matched, widened
from .checks import check_input, check_residual, check_vectors
from .declare import Derivative, declare
from .seeds import cleared, seed_for


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, ctx.p, seed = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    wants_x, wants_bias = ctx.needs_input_grad[:2]
    grad_x, grad_bias = grad, None
    if wants_bias or (wants_x and seed is not None):
        dropped, grad_bias = _bias_dropout_residual_backward(grad.contiguous(), ctx.has_bias, ctx.p, seed)
        grad_x = grad if seed is None else dropped
    return grad_x, grad_bias if ctx.has_bias else None, grad, None, None


def _fake_backward(
    grad: Tensor,
    has_bias: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grad_x = grad.new_empty(0) if seed is None else torch.empty_like(grad)
    return grad_x, grad.new_empty(grad.shape[-1] if has_bias else 0)


_bias_dropout_residual = declare(
    "bias_dropout_residual",
    "(Tensor x, Tensor? bias, Tensor residual, float p, Tensor? seed) -> Tensor",
    fake=lambda x, bias, residual, p, seed: torch.empty_like(x),
    derivative=Derivative(_save, _differentiate),
)
_bias_dropout_residual_backward = declare(
    "bias_dropout_residual_backward",
    "(Tensor grad, bool has_bias, float p, Tensor? seed) -> (Tensor, Tensor)",
    fake=_fake_backward,
)


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    *,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Return ``residual + dropout(x + bias)`` in one pass over memory; the backward pass is one, too.

    Nothing is kept for the backward pass but the seed: what was dropped follows from it and an element's place, the
    same on every backend and device ([Note: Element numbers] in ``backends/plain/philox.py``). In float32 12 bytes are
    moved for each element forward and 8 backward, without dropout 12 and 4; eager torch moves 44 and 16, and keeps a
    mask as large as ``x``. A dropped element adds nothing, whatever it was. Rounded once.

    Args:
        x: ``[..., n]``; float32, bfloat16 or float16.
        bias: ``[n]``, of the same data type; None: no bias.
        residual: Like ``x``.
        p: Probability that an element is dropped; rounded to a multiple of 2**-16, and what stays is scaled by the
            rounded one, so that the mean is kept. With 1 all are dropped, in a pass or two of their own.
        training: False: nothing is dropped, and no seed drawn; nor is one where ``p`` is 0 or 1.
        seed: 0D, int64, on the device of ``x``; None draws one from torch's default generator: fresh masks at each
            call, the same ones after the same ``torch.manual_seed`` and when an activation checkpoint computes again.

    Returns:
        Like ``x``.

    Raises:
        TypeError: If ``x`` or ``seed`` is no tensor.
        ValueError: If shapes, data types, devices, ``p`` or ``seed`` do not fit.

    Example:
        >>> x, seed = torch.ones(1, 6), torch.tensor(1)
        >>> bias_dropout_residual(x, torch.ones(6), 10 * x, 0.5, seed=seed)
        tensor([[10., 14., 10., 14., 10., 14.]])

    Reference:
        Nitish Srivastava and others, Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014.
    """
    check_input("x", x)
    x, residual = widened(x, residual)
    check_residual(x, residual)
    (bias,) = matched(x, bias)
    check_vectors(x, {"bias": bias})
    seed = seed_for(x, p, seed, training=training)
    if training and p == 1:
        p, x, bias = 0.0, cleared(x), None if bias is None else cleared(bias)
    contiguous = None if bias is None else bias.contiguous()
    result: Tensor = _bias_dropout_residual(x.contiguous(), contiguous, residual.contiguous(), p, seed)
    return result
