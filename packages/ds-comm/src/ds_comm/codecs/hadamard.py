"""A rotation before another code: it spreads large elements over their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .plain import PlainCodec

if TYPE_CHECKING:
    from ..codec import Codec

__all__ = ["HadamardCodec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HadamardCodec(PlainCodec):
    """Plays the role ``Codec``: ``inner`` codes the Hadamard transform of each ``size`` consecutive elements.

    The transform is orthonormal, so what is lost keeps its size, and turns a block with one large element into one of
    even magnitudes, which integers code well. Elements behind the last whole ``size`` stay as they are. It takes
    ``log2(size)`` passes of additions, and 2 temporaries of float32.

    Example:
        >>> from .block import BlockCodec
        >>> from .contraction import contraction
        >>> x, plain = torch.randn(1024, generator=torch.Generator().manual_seed(0)), BlockCodec(code="int4", block=64)
        >>> x[::64] = 100.0
        >>> lost = (contraction(x, codec) * float(x.square().sum()) for codec in (plain, HadamardCodec(inner=plain)))
        >>> [round(each / 1008, 2) for each in lost]  # of 1008 elements with squares of 1
        [1.07, 0.39]

    Reference:
        Jinda Jia and others, SDP4Bit: Toward 4-bit Communication Quantization in Sharded Data Parallelism, 2024.
    """

    inner: Codec
    """Codes what was rotated; its blocks hold whole rotations, or rotations whole blocks."""
    size: int = 64
    """Elements that are rotated together, a power of two."""

    def __post_init__(self) -> None:
        if self.size < 2 or self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, at least 2; got {self.size}")
        if max(self.size, self.inner.block) % min(self.size, self.inner.block):
            raise ValueError(
                f"size and the inner codec's block must divide each other; got {self.size} and {self.inner.block}"
            )

    @property
    def block(self) -> int:
        """Elements that are coded together."""
        return max(self.size, self.inner.block)

    @property
    def meaning(self) -> str:
        """What payloads stand for, in words."""
        return f"{self.inner.meaning}, of rotations of {self.size}"

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements: those of the inner code."""
        return self.inner.payload_bytes(numel)

    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        self.inner.encode(self._rotated(values), payload=payload)
        return self._values(payload, values.numel(), 1.0)

    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        coded = self.inner.decode(payload, torch.empty(numel, device=payload.device))
        return self._rotated(coded) * factor

    def _rotated(self, values: Tensor) -> Tensor:
        """Return the transform, which is its own inverse."""
        end = values.numel() // self.size * self.size
        rows, stride = values[:end], 1
        while stride < self.size:
            left, right = rows.view(-1, 2, stride).unbind(1)
            rows = torch.stack((left + right, left - right), dim=1)
            stride *= 2
        return torch.cat((rows.view(-1) * self.size**-0.5, values[end:]))
