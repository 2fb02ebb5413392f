"""Optimizers that look at more than one element at a time, for partitioned parameters and for plain loops.

Importable as :mod:`ds_zero.optim`; each is an ordinary ``torch.optim.Optimizer``.
"""

from .lamb import Lamb
from .lars import Lars
from .muon import Muon

__all__ = ["Lamb", "Lars", "Muon"]
