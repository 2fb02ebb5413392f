"""What ops do under ``torch.autocast``.

[Note: Autocast]
Under autocast, a model's parameters are float32 while its products are in a lower type, so ops get both. Matrix
products (``linear_gelu``, ``linear_cross_entropy``) cast all operands to autocast's type, as torch's do. The others
compute in the type of their input, the wider one where there are two (``x`` and ``residual``, as torch's addition), and
cast parameters to it. float64 is never cast down. Kernels run with autocast off: they say themselves in what they
compute. Without autocast, types must agree, and nothing is cast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the type to which autocast casts on such devices; None where it is off.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype("cpu"), autocast_dtype("meta")
        (torch.bfloat16, None)
    """
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """Return a context in which autocast is off; it costs nothing where it is off already."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device_type, enabled=False)
    return off


def lowered(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Return the operands of a matrix product, under autocast in its type."""
    dtype = autocast_dtype(x.device.type)
    return [_cast(tensor, dtype) for tensor in (x, *others)]


def widened(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return both terms of a sum, under autocast in the wider type of the two."""
    if x.dtype == residual.dtype or autocast_dtype(x.device.type) is None:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def matched(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Return ``parameters``, under autocast in the type of ``x``."""
    dtype = None if autocast_dtype(x.device.type) is None else x.dtype
    return [_cast(tensor, dtype) for tensor in parameters]


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if tensor is None or dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
