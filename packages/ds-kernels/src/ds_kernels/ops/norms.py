"""Norms after the addition of a residual: what a transformer block does between its parts, in one pass over memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .autocast import matched, widened
from .checks import check_input, check_residual, check_vectors
from .declare import Derivative, declare


def _fake_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), total, _fake_statistic(x), _fake_statistic(x)


def _fake_layer_norm_backward(  # noqa: PLR0917 - the op's schema
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _fake_weight(x, weight), _fake_weight(x, weight)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, total, mean, scale = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, scale)
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.mark_non_differentiable(mean, scale)
    ctx.set_materialize_grads(False)


def _differentiate_layer_norm(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, mean, scale = ctx.saved_tensors
    grads = _contiguous(total, grad, grad_sum if ctx.has_residual else None)
    grad_x, grad_weight, grad_bias = _layer_norm_backward(*grads, total, weight, mean, scale)
    residual = grad_x if ctx.has_residual else None
    return grad_x, residual, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None


def _fake_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), total, _fake_statistic(x)


def _fake_rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _fake_weight(x, weight)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.save_for_backward(x if residual is None else total, weight, scale)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)


def _differentiate_rms_norm(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, scale = ctx.saved_tensors
    grads = _contiguous(total, grad, grad_sum if ctx.has_residual else None)
    grad_x, grad_weight = _rms_norm_backward(*grads, total, weight, scale)
    return grad_x, grad_x if ctx.has_residual else None, None if weight is None else grad_weight, None


_layer_norm = declare(
    "layer_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_layer_norm,
    derivative=Derivative(_save_layer_norm, _differentiate_layer_norm),
)
_layer_norm_backward = declare(
    "layer_norm_backward",
    "(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? weight, Tensor mean, Tensor scale) -> (Tensor, Tensor, Tensor)",
    fake=_fake_layer_norm_backward,
)
_rms_norm = declare(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_rms_norm,
    derivative=Derivative(_save_rms_norm, _differentiate_rms_norm),
)
_rms_norm_backward = declare(
    "rms_norm_backward",
    "(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? weight, Tensor scale) -> (Tensor, Tensor)",
    fake=_fake_rms_norm_backward,
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Normalize each row of ``x + residual`` to mean 0 and variance 1; return the sum, too: the next residual.

    Statistics are float32. With a residual in float32, 16 bytes are moved for each element forward and 16 backward (the
    gradients of both results go in at once), where addition and norm by themselves move 20 and 24.

    Args:
        x: ``[..., n]``; float32, bfloat16 or float16.
        weight: ``[n]``, of the same data type, or None.
        bias: ``[n]``, of the same data type, or None; not without ``weight``.
        residual: Like ``x``, or None.
        eps: Added to the variance.

    Returns:
        The normalized rows, and ``x + residual`` rounded to the data type (``x`` itself without residual).

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If shapes, data types or devices do not fit.

    Example:
        >>> normalized, residual = layer_norm(torch.tensor([[1.0, 3.0]]), residual=torch.tensor([[1.0, 1.0]]), eps=0.0)
        >>> normalized, residual
        (tensor([[-1.,  1.]]), tensor([[2., 4.]]))

    Reference:
        Jimmy Lei Ba, Jamie Ryan Kiros and Geoffrey Hinton, Layer Normalization, 2016.
    """
    if bias is not None and weight is None:
        raise ValueError("bias is taken with weight only; got no weight; pass torch.ones_like(bias)")
    x, residual, vectors = _checked(x, {"weight": weight, "bias": bias}, residual)
    arguments = [None if t is None else t.contiguous() for t in (residual, *vectors)]
    out, total, _, _ = _layer_norm(x.contiguous(), *arguments, eps)
    return out, x if residual is None else total


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Divide each row of ``x + residual`` by its root mean square; return the sum, too: the next residual.

    As :func:`layer_norm`, without the mean and the bias.

    Args:
        x: ``[..., n]``; float32, bfloat16 or float16.
        weight: ``[n]``, of the same data type, or None.
        residual: Like ``x``, or None.
        eps: Added to the mean square.

    Returns:
        The normalized rows, and ``x + residual`` rounded to the data type (``x`` itself without residual).

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If shapes, data types or devices do not fit.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, 2.0]), eps=0.0)[0]
        tensor([[1., 2.]])

    Reference:
        Biao Zhang and Rico Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    x, residual, vectors = _checked(x, {"weight": weight}, residual)
    arguments = [None if t is None else t.contiguous() for t in (residual, *vectors)]
    out, total, _ = _rms_norm(x.contiguous(), *arguments, eps)
    return out, x if residual is None else total


def _checked(
    x: Tensor, vectors: Mapping[str, Tensor | None], residual: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return ``x``, the residual and the vectors as the kernel takes them; see [Note: Autocast]."""
    check_input("x", x)
    if residual is not None:
        x, residual = widened(x, residual)
        check_residual(x, residual)
    named = dict(zip(vectors, matched(x, *vectors.values())))
    check_vectors(x, named)
    return x, residual, list(named.values())


def _fake_statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_empty(0) if weight is None else torch.empty_like(weight)


def _contiguous(x: Tensor, grad: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients as kernels take them; that of the norm is there also where only the sum was used."""
    first = torch.zeros_like(x) if grad is None else grad.contiguous()
    return first, None if grad_sum is None else grad_sum.contiguous()
