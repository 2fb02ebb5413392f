"""Softmax of masked attention scores and dropout, in plain torch: what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .dropout import dropped
from .precision import widened


def masked_softmax_dropout(  # noqa: PLR0917 - the op's schema
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the probabilities after dropout, and before it (empty without seed: the same).

    See :func:`ds_kernels.ops.masked_softmax_dropout`.
    """
    seen = widened(scores) * scale
    if mask is not None:
        seen = seen + widened(mask)
    if causal:
        queries, keys = scores.shape[-2:]
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1)
        seen = seen.masked_fill(ahead, -torch.inf)
    if scores.numel():
        most = seen.amax(-1, keepdim=True)
        seen = (seen - most.masked_fill(most == -torch.inf, 0.0)).exp()
    total = seen.sum(-1, keepdim=True)
    probabilities = seen / total.masked_fill(total == 0.0, 1.0)
    stored = probabilities.to(scores.dtype)
    if seed is None:
        return stored, scores.new_empty(0)
    return dropped(probabilities, p, seed).to(scores.dtype, copy=True), stored


def masked_softmax_dropout_backward(  # noqa: PLR0917 - the op's schema
    grad: Tensor,
    probabilities: Tensor,
    scale: float,
    causal: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the gradient of the scores."""
    inner, wide = dropped(widened(grad), p, seed), widened(probabilities)
    along = (inner * wide).sum(-1, keepdim=True)
    return (wide * (inner - along) * scale).to(grad.dtype)


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "masked_softmax_dropout": masked_softmax_dropout,
        "masked_softmax_dropout_backward": masked_softmax_dropout_backward,
    }
)
"""By name of the op."""
