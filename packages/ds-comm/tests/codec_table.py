"""The codecs under test, and numbers to code."""

from __future__ import annotations

import torch
from ds_comm.codecs import BlockCodec, CastCodec, E8Codec, Fp8Codec, HadamardCodec, TopKCodec
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = ("sign", "ternary", "int4", "int8")
CODECS = {
    **{code: BlockCodec(code=code) for code in CODES},
    **{f"{code} of 192, float16": BlockCodec(code=code, block=192, scale_dtype=torch.float16) for code in CODES},
    "sign, rms": BlockCodec(code="sign", scale="rms"),
    **{f"cast to {dtype}": CastCodec(dtype=dtype) for dtype in FLOATS},
    "e8": E8Codec(),
    "e8 of 192": E8Codec(block=192),
    "fp8": Fp8Codec(),
    "fp8, float16": Fp8Codec(block=192, scale_dtype=torch.float16),
    "top 3 of 100": TopKCodec(keep=3, block=100),
    "top 64 of 64": TopKCodec(keep=64, block=64, dtype=torch.float32),
    "top 100 of 50000": TopKCodec(keep=100, block=50_000, dtype=torch.bfloat16),
    "hadamard int4": HadamardCodec(inner=BlockCodec(code="int4", block=192)),
    "hadamard sign": HadamardCodec(inner=BlockCodec(code="sign", block=64), size=128),
}


def numbers(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of many sizes, every seventh 0."""
    generator = torch.Generator().manual_seed(1000 * seed + numel)
    x = torch.randn(numel, generator=generator) * torch.exp(2 * torch.randn(numel, generator=generator))
    x[::7] = 0
    return x.to(dtype)
