"""Memory of tensors as bytes."""

from __future__ import annotations

import ctypes

from torch import Tensor


def byte_view(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor; valid as long as the tensor is."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
