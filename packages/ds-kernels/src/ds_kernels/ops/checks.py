"""What ops ask of what a program hands them, before they look at shapes and data types any further."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_input(name: str, x: Tensor) -> None:
    """Check that ``x`` is a tensor of floating-point numbers with at least one dimension.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is one of other numbers, or a single one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}; convert it with torch.as_tensor()")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be of a floating-point type; got {x.dtype}; convert it with .to(torch.float32)")
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension; got a single number, shape (); pass {name}[None]")


def check_vectors(x: Tensor, vectors: Mapping[str, Tensor | None]) -> None:
    """Check that each of ``vectors`` has one value for each column of ``x``, in its data type.

    Raises:
        ValueError: If one does not.
    """
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != x.shape[-1:] or vector.dtype != x.dtype):
            raise ValueError(
                f"{name} must be one {x.dtype} value for each of the {x.shape[-1]} columns of x; got {vector.dtype} of "
                f"shape {tuple(vector.shape)}"
            )


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Check that ``residual`` has the shape and data type of ``x``.

    Raises:
        ValueError: If it has not.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {x.dtype} of shape {tuple(x.shape)}, as x; got {residual.dtype} of shape "
            f"{tuple(residual.shape)}"
        )


def check_seed(seed: Tensor, device: torch.device) -> None:
    """Check that ``seed`` is one number on ``device``.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is not one int64, or elsewhere.
    """
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"seed must be a torch.Tensor, so that it can be drawn on the device; got {type(seed).__name__}; pass "
            f"torch.tensor({seed!r}, device=x.device)"
        )
    if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed must be one int64 number on {device}, of shape (); got {seed.dtype} of shape "
            f"{tuple(seed.shape)} on {seed.device}"
        )
