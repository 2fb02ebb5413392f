"""Tensors as the native module takes them: addresses, numbers of rows and columns."""

from __future__ import annotations

import math

from torch import Tensor

from .module import FORMATS


def address(name: str, tensor: Tensor | None) -> int:
    """Return where the elements begin; 0 for None.

    Raises:
        ValueError: If the tensor is not contiguous host memory.
    """
    if tensor is None:
        return 0
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous and in host memory; got shape {tuple(tensor.shape)}, strides {tensor.stride()} "
            f"on {tensor.device}; pass {name}.cpu().contiguous()"
        )
    return tensor.data_ptr()


def rows_and_columns(x: Tensor) -> tuple[int, int]:
    """Return the number of rows, and the length of the last dimension."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def format_of(x: Tensor) -> int:
    """Return the number of the data type."""
    return FORMATS[x.dtype]
