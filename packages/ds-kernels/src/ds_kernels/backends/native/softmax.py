"""Softmax of masked attention scores and dropout, native: one pass over memory forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention_shape import mask_of, rows_of
from .arguments import address, format_of
from .dropout import key

if TYPE_CHECKING:
    from ..._native import Kernels


def masked_softmax_dropout(  # noqa: PLR0917 - the op's schema
    kernels: Kernels,
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the probabilities after dropout, and before it (empty without seed: the same).

    See :func:`ds_kernels.ops.masked_softmax_dropout`. Sums depend on the number of keys alone.
    """
    rows, probabilities = rows_of(scores), torch.empty_like(scores)
    dropped = scores.new_empty(0) if seed is None else torch.empty_like(scores)
    broadcast = None if mask is None else mask_of(mask, rows)
    kernels.softmax(
        (
            address("scores", scores),
            0 if broadcast is None else broadcast.tensor.data_ptr(),
            probabilities.data_ptr(),
            dropped.data_ptr(),
        ),
        rows,
        (0, 0, 0) if broadcast is None else broadcast.strides,
        (scale, causal),
        key(p, seed),
        format_of(scores),
        torch.get_num_threads(),
    )
    return (probabilities, dropped) if seed is None else (dropped, probabilities)


def masked_softmax_dropout_backward(  # noqa: PLR0917 - the op's schema
    kernels: Kernels,
    grad: Tensor,
    probabilities: Tensor,
    scale: float,
    causal: bool,  # noqa: FBT001 - the op's schema
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the gradient of the scores."""
    out = torch.empty_like(grad)
    kernels.softmax_backward(
        (address("grad", grad), address("probabilities", probabilities), out.data_ptr()),
        rows_of(grad),
        (scale, causal),
        key(p, seed),
        format_of(grad),
        torch.get_num_threads(),
    )
    return out


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "masked_softmax_dropout": masked_softmax_dropout,
        "masked_softmax_dropout_backward": masked_softmax_dropout_backward,
    }
)
"""By name of the op; the first argument is the native module's kernels."""
