"""Functional ops for models: differentiable, seen by ``torch.compile``, run by the backend that the registry picks."""

from .activations import bias_gelu

__all__ = ["bias_gelu"]
