"""Functional ops for models: differentiable, seen by ``torch.compile``, run by the backend that the registry picks."""

from .activations import bias_gelu, bias_swiglu
from .attention import masked_softmax_dropout
from .dropout import bias_dropout_residual
from .linear import gelu_mlp, linear_gelu
from .losses import linear_cross_entropy
from .norms import layer_norm, rms_norm

__all__ = [
    "bias_dropout_residual",
    "bias_gelu",
    "bias_swiglu",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "masked_softmax_dropout",
    "rms_norm",
]
