"""Optimizers as ``torch.optim`` has them, one fused kernel for each parameter, with state in fewer bytes if wanted."""

from ..rounding import StochasticRounding
from .adagrad import FusedAdagrad
from .adam import CpuAdam, FusedAdam
from .lamb import FusedLamb
from .lion import FusedLion
from .sgd import FusedSGD

__all__ = ["CpuAdam", "FusedAdagrad", "FusedAdam", "FusedLamb", "FusedLion", "FusedSGD", "StochasticRounding"]
