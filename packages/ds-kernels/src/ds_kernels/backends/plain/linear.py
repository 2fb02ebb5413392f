"""Linear layers with what follows them, in plain torch: what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn import functional


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``gelu(x @ weight.T + bias)`` and what is inside; see :func:`ds_kernels.ops.linear_gelu`."""
    inside = functional.linear(x, weight, bias)
    return functional.gelu(inside), inside


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType({"linear_gelu": linear_gelu})
"""By name of the op."""
