"""What the Triton kernels are told of tensors, and where they are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def rows_and_columns(x: Tensor) -> tuple[int, int]:
    """Return the number of rows of ``x``, and the length of its last dimension."""
    columns = x.shape[-1] if x.dim() else 1
    return (x.numel() // columns if columns else 0), columns


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``x`` the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
