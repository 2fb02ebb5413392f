"""Codes for compressed messages; each plays the role ``Codec``."""

from .block import BlockCodec
from .contraction import contraction
from .e8 import E8Codec
from .floats import CastCodec, Fp8Codec
from .hadamard import HadamardCodec
from .topk import TopKCodec

__all__ = ["BlockCodec", "CastCodec", "E8Codec", "Fp8Codec", "HadamardCodec", "TopKCodec", "contraction"]
