"""Losses of the cpu backend: the shared loop around a native pass over the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import mark_written
from ..linear_cross_entropy import (
    Terms,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    linear_cross_entropy_rows_backward,
)
from .module import FORMATS

if TYPE_CHECKING:
    from ..._native import Kernels


def cross_entropy(
    kernels: Kernels,
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    losses: Tensor,
    *,
    scales: Tensor | None,
    differentiate: bool,
) -> None:
    """Write the loss of each row, and if asked its gradient over the logits, in one pass; meaning as in plain torch."""
    kernels.cross_entropy(
        logits.data_ptr(),
        target.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        losses.data_ptr(),
        len(logits),
        logits.shape[1],
        FORMATS[logits.dtype],
        differentiate,
        torch.get_num_threads(),
        terms,
    )
    mark_written(losses, logits if differentiate else None)


def _around(loop: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(kernels: Kernels, *args: Any) -> Any:
        return loop(functools.partial(cross_entropy, kernels), *args)

    return kernel


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "linear_cross_entropy": _around(linear_cross_entropy),
        "linear_cross_entropy_rows": _around(linear_cross_entropy_rows),
        "linear_cross_entropy_rows_backward": _around(linear_cross_entropy_rows_backward),
    }
)
"""By name of the op; the first argument is the native module's kernels."""
