"""Codes for compressed messages; each plays the role ``Codec``."""

from .block import BlockCodec
from .contraction import contraction
from .floats import CastCodec, Fp8Codec
from .hadamard import HadamardCodec
from .topk import TopKCodec

__all__ = ["BlockCodec", "CastCodec", "Fp8Codec", "HadamardCodec", "TopKCodec", "contraction"]
