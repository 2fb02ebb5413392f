"""Functional ops for models: differentiable, seen by ``torch.compile``, run by the backend that the registry picks."""

from .activations import bias_gelu
from .linear import linear_gelu
from .losses import linear_cross_entropy

__all__ = ["bias_gelu", "linear_cross_entropy", "linear_gelu"]
