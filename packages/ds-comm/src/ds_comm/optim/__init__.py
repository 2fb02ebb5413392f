"""Optimizers for slow links: they communicate themselves, in few bits or rarely."""

from .compressed_adam import CompressedAdam
from .link import Link
from .local_steps import LocalSteps
from .one_bit_adam import OneBitAdam
from .one_bit_lamb import OneBitLamb
from .zero_one_adam import ZeroOneAdam

__all__ = ["CompressedAdam", "Link", "LocalSteps", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
