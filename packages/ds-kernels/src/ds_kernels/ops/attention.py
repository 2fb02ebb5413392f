"""From attention scores to weights: scale, mask, softmax and dropout in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import matched
from .checks import check_input
from .declare import Derivative, declare
from .seeds import cleared, seed_for


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, mask, ctx.scale, ctx.causal, ctx.p, seed = inputs
    weights, probabilities = output
    ctx.mark_non_differentiable(probabilities)
    ctx.set_materialize_grads(False)
    ctx.mask_shape = None if mask is None else mask.shape
    ctx.save_for_backward(weights if seed is None else probabilities, seed)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad_scores = grad_mask = None
    if grad is not None:
        probabilities, seed = ctx.saved_tensors
        terms = grad.contiguous(), probabilities
        if ctx.needs_input_grad[1]:  # before the scale, which the mask does not have
            inner = _masked_softmax_dropout_backward(*terms, 1.0, ctx.causal, ctx.p, seed)
            grad_scores, grad_mask = inner * ctx.scale, inner.sum_to_size(ctx.mask_shape)
        else:
            grad_scores = _masked_softmax_dropout_backward(*terms, ctx.scale, ctx.causal, ctx.p, seed)
    return grad_scores, grad_mask, None, None, None, None


def _fake(scores: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    seed: Tensor | None = args[-1]
    return torch.empty_like(scores), scores.new_empty(0) if seed is None else torch.empty_like(scores)


_TERMS = "float scale, bool causal, float p, Tensor? seed"
_masked_softmax_dropout = declare(
    "masked_softmax_dropout",
    f"(Tensor scores, Tensor? mask, {_TERMS}) -> (Tensor, Tensor)",
    fake=_fake,
    derivative=Derivative(_save, _differentiate),
)
_masked_softmax_dropout_backward = declare(
    "masked_softmax_dropout_backward",
    f"(Tensor grad, Tensor probabilities, {_TERMS}) -> Tensor",
    fake=lambda grad, probabilities, scale, causal, p, seed: torch.empty_like(grad),
)


def masked_softmax_dropout(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    p: float = 0.0,
    scale: float = 1.0,
    causal: bool = False,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Return ``dropout(softmax(scores * scale + mask))`` over the last dimension, in one pass over memory.

    For attention whose dropout repeats on every backend; without dropout, ``scaled_dot_product_attention`` never holds
    the scores at all. Kept for the backward pass: the probabilities before dropout and the seed, no mask. In float32 12
    bytes are moved for each score forward (8 without dropout) and 12 backward. A query that sees no key has weights 0,
    and its scores gradients 0, where torch has NaN.

    Args:
        scores: ``[..., queries, keys]``, two to four dimensions, as ``[batch, heads, queries, keys]``; any number of
            keys; float32, bfloat16 or float16.
        mask: Broadcastable to the shape of ``scores``: numbers of the same data type to add, minus infinity for what is
            not seen, or bool, True for what is; None: all is seen. It is read where it is, however it is broadcast (a
            bool one becomes numbers first).
        p: Probability that a weight is dropped; as in :func:`bias_dropout_residual`.
        scale: Factor on the scores, usually ``1 / sqrt(features of a head)``.
        causal: Whether query i sees keys 0 to i only, besides ``mask``; the others are not computed.
        training: False: nothing is dropped.
        seed: As in :func:`bias_dropout_residual`.

    Returns:
        Like ``scores``.

    Raises:
        TypeError: If ``scores`` or ``seed`` is no tensor.
        ValueError: If shapes, data types, devices, ``p`` or ``seed`` do not fit.

    Example:
        >>> masked_softmax_dropout(torch.zeros(3, 3), causal=True)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])

    Reference:
        Ashish Vaswani and others, Attention Is All You Need, 2017.
    """
    check_input("scores", scores)
    if not 2 <= scores.dim() <= 4:
        raise ValueError(
            f"scores must be [queries, keys], [heads, queries, keys] or [batch, heads, queries, keys]; got shape "
            f"{tuple(scores.shape)}"
        )
    seed = seed_for(scores, p, seed, training=training)
    added = None if mask is None else _added(mask, scores)
    ratio = 0.0 if seed is None else p
    result: Tensor = _masked_softmax_dropout(scores.contiguous(), added, float(scale), causal, ratio, seed)[0]
    return cleared(result) if training and p == 1 else result


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """Return what the mask adds to the scores."""
    (mask,) = matched(scores, mask)
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    fits = 1 <= mask.dim() <= scores.dim() and all(size in (1, whole) for size, whole in sizes)
    if not fits or mask.dtype not in (torch.bool, scores.dtype):
        raise ValueError(
            f"mask must be bool or {scores.dtype}, with a shape that broadcasts to {tuple(scores.shape)}; got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
