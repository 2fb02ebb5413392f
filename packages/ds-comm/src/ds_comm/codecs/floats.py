"""Floating-point numbers of fewer bits: 16 as they are, 8 with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .digits import inverse, stored
from .layout import FLOATS, Layout, check_layout
from .plain import PlainCodec

__all__ = ["CastCodec", "Fp8Codec"]

_FP8 = torch.float8_e4m3fn
_LARGEST = 448.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CastCodec(PlainCodec):
    """Plays the role ``Codec``: each element in another data type, rounded to nearest.

    Finite elements stay finite: what exceeds the range becomes its end. With float32 nothing is lost.

    Example:
        >>> codec = CastCodec(dtype=torch.bfloat16)
        >>> codec.decode(codec.encode(torch.tensor([1.0, 1.001])), torch.empty(2))
        tensor([1., 1.])
    """

    dtype: torch.dtype = torch.bfloat16
    """bfloat16, float16 or float32."""

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype must be {' or '.join(map(str, FLOATS))}; got {self.dtype}")

    @property
    def block(self) -> int:
        """1: each element is coded by itself."""
        return 1

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of ``numel`` elements."""
        return numel * self.dtype.itemsize

    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        cast = cast_finite(values, self.dtype)
        payload.copy_(cast.view(torch.uint8))
        return cast.to(torch.float32)

    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        # cloned: a payload within a message need not be aligned for floats
        return payload.clone().view(self.dtype).to(torch.float32) * factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Codec(PlainCodec):
    """Plays the role ``Codec``: float8 (e4m3) in blocks, the largest magnitude of each at 448.

    Scales come first in the payload, one for each block, then one byte for each element. Relative to its block's
    largest, an element has 4 significant bits down to 2^-14 of it: relative, where ``int8`` has an absolute.

    Example:
        >>> codec, x = Fp8Codec(block=64), torch.tensor([1.0, -0.01, 0.0001])
        >>> ((codec.decode(codec.encode(x), torch.empty(3)) - x).abs() <= x.abs() / 16).all().item()
        True

    Reference:
        Paulius Micikevicius and others, FP8 Formats for Deep Learning, 2022.
    """

    block: int = 256
    """Consecutive elements that share a scale: a multiple of 64 in 64 ... 1024."""
    scale_dtype: torch.dtype = torch.float32
    """Type of the scales in the payload: float32 or float16."""

    def __post_init__(self) -> None:
        check_layout(self._layout)

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements."""
        return self._layout.payload_bytes(numel)

    @property
    def _layout(self) -> Layout:
        return Layout("int8", self.block, self.scale_dtype)  # a byte for each element, too

    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        sent = torch.empty_like(values)
        for part in self._layout.parts(values.numel()):
            rows = values[part.elements].view(part.blocks, -1)
            scales = stored(rows.abs().amax(1, keepdim=True) / _LARGEST, self.scale_dtype)
            codes = (rows * inverse(scales)).clamp_(-_LARGEST, _LARGEST).to(_FP8)
            payload[part.scales] = scales.view(-1).view(torch.uint8)
            payload[part.codes] = codes.view(-1).view(torch.uint8)
            torch.mul(codes.to(torch.float32), scales.to(torch.float32), out=sent[part.elements].view_as(rows))
        return sent

    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        found = torch.empty(numel, device=payload.device)
        for part in self._layout.parts(numel):
            scales = payload[part.scales].clone().view(self.scale_dtype).to(torch.float32) * factor
            values = payload[part.codes].view(_FP8).to(torch.float32).view(part.blocks, -1)
            torch.mul(values, scales.unsqueeze(1), out=found[part.elements].view_as(values))
        return found


def cast_finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` in ``dtype``; finite ones stay finite."""
    largest = torch.finfo(dtype).max
    return values.where(~values.isfinite(), values.clamp(-largest, largest)).to(dtype)
