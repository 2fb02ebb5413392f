"""Losses in plain torch: what they mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..linear_cross_entropy import (
    Terms,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    linear_cross_entropy_rows_backward,
)


def cross_entropy(
    logits: Tensor, target: Tensor, terms: Terms, losses: Tensor, *, scales: Tensor | None, differentiate: bool
) -> None:
    """Write the loss of each row, and if asked its gradient over the logits.

    With e the label smoothing, V the vocabulary and lse the logarithm of the sum of the exponentials of z::

        loss   = lse - (1 - e) z[target] - e mean(z) + z_loss lse^2
        dz[j]  = softmax(z)[j] (1 + 2 z_loss lse) - e / V - (1 - e) [j = target]

    Both are 0 where the target is ``ignore_index``.
    """
    z, smoothing = logits.to(losses.dtype), terms.label_smoothing
    counted = target != terms.ignore_index
    at = target.where(counted, 0).unsqueeze(1)
    lse = z.logsumexp(1)
    loss = lse - (1 - smoothing) * z.gather(1, at).squeeze(1) + terms.z_loss * lse.square()
    if smoothing:
        loss = loss - smoothing * z.mean(1)
    losses.copy_(loss.where(counted, 0))
    if differentiate:
        grad = (z - lse.unsqueeze(1)).exp_().mul_((1 + 2 * terms.z_loss * lse).unsqueeze(1))
        if smoothing:
            grad.sub_(smoothing / z.shape[1])
        grad.scatter_add_(1, at, grad.new_full(at.shape, smoothing - 1))
        if scales is not None:
            grad.mul_(scales.unsqueeze(1))
        logits.copy_(grad.masked_fill_(~counted.unsqueeze(1), 0))


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "linear_cross_entropy": functools.partial(linear_cross_entropy, cross_entropy),
        "linear_cross_entropy_rows": functools.partial(linear_cross_entropy_rows, cross_entropy),
        "linear_cross_entropy_rows_backward": functools.partial(linear_cross_entropy_rows_backward, cross_entropy),
    }
)
"""By name of the op."""
