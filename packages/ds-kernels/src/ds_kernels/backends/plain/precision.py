"""The precision that ops are calculated in."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or in float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
