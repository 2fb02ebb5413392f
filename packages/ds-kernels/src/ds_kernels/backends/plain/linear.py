"""Linear layers with what follows them, in plain torch: what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``gelu(x @ weight.T + bias)`` and what is inside; see :func:`ds_kernels.ops.linear_gelu`."""
    inside = functional.linear(x, weight, bias)
    return functional.gelu(inside), inside


def linear_after_gelu(hidden: Tensor, inside: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``hidden @ weight.T + bias``; ``inside``, whose GELU is ``hidden``, is for the derivative."""
    del inside
    return functional.linear(hidden, weight, bias)


def linear_dgelu(grad: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """Return ``(grad @ weight) * gelu'(inside)``; see :func:`ds_kernels.ops.gelu_mlp`."""
    result: Tensor = torch.ops.aten.gelu_backward(grad @ weight, inside)
    return result


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"linear_gelu": linear_gelu, "linear_after_gelu": linear_after_gelu, "linear_dgelu": linear_dgelu}
)
"""By name of the op."""
