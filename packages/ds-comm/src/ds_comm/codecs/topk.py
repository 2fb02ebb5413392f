"""The largest elements of each block, and nothing of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .floats import cast_finite
from .layout import FLOATS
from .plain import PlainCodec

__all__ = ["TopKCodec"]

_MAX_BLOCK = 65536  # an index within a block takes 2 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKCodec(PlainCodec):
    """Plays the role ``Codec``: values and places of the ``keep`` largest magnitudes of each block.

    Of a shorter block at the end it keeps the same share, rounded up. All values come first in the payload, block after
    block and in the order of their places, then all places, 2 bytes each. Of equal magnitudes the first are kept; NaN
    counts as the largest. Meant to be used with error feedback: what is not sent now has to be sent later.

    Example:
        >>> codec = TopKCodec(keep=1, block=64, dtype=torch.float32)
        >>> x, error = torch.tensor([0.5, -3.0, 2.0]), torch.zeros(3)
        >>> codec.decode(codec.encode(x, error=error), torch.empty(3)), error
        (tensor([ 0., -3.,  0.]), tensor([0.5000, 0.0000, 2.0000]))

    Reference:
        Dan Alistarh and others, The Convergence of Sparsified Gradient Methods, 2018.
    """

    keep: int
    """Elements of each block that are sent, at least 1."""
    block: int = 4096
    """Consecutive elements among which the largest are chosen, 1 ... 65536."""
    dtype: torch.dtype = torch.float16
    """Of the values: float32, bfloat16 or float16; finite ones stay finite."""

    def __post_init__(self) -> None:
        if not 1 <= self.block <= _MAX_BLOCK or not 1 <= self.keep <= self.block:
            raise ValueError(
                f"1 <= keep <= block <= {_MAX_BLOCK} must hold; got keep = {self.keep}, block = {self.block}"
            )
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype must be {' or '.join(map(str, FLOATS))}; got {self.dtype}")

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements.

        Example:
            >>> TopKCodec(keep=32, block=1024).payload_bytes(1_000_000)
            125000
        """
        return self._kept(numel) * (self.dtype.itemsize + 2)

    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        places = torch.cat([_largest(rows, keep) for rows, keep in self._rows(values)])
        indices = places + self._starts(values.numel(), values.device)
        kept = cast_finite(values[indices], self.dtype)
        at = kept.nbytes
        payload[:at] = kept.view(torch.uint8)
        payload[at:] = places.to(torch.int16).view(torch.uint8)  # what exceeds 15 bits wraps around
        return torch.zeros_like(values).index_put_((indices,), kept.to(torch.float32))

    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        at = self._kept(numel) * self.dtype.itemsize
        # cloned: a payload within a message need not be aligned for numbers
        kept = payload[:at].clone().view(self.dtype).to(torch.float32) * factor
        places = payload[at:].clone().view(torch.int16).to(torch.int64) & (_MAX_BLOCK - 1)
        indices = places + self._starts(numel, payload.device)
        return torch.zeros(numel, device=payload.device).index_put_((indices,), kept)

    def _kept(self, numel: int) -> int:
        whole, rest = divmod(numel, self.block)
        return whole * self.keep + self._share(rest)

    def _share(self, rest: int) -> int:
        return -(-rest * self.keep // self.block)

    def _rows(self, values: Tensor) -> list[tuple[Tensor, int]]:
        """Return the whole blocks as rows, then the rest as one, each with how many of a row are kept."""
        end = values.numel() // self.block * self.block
        rest = values.numel() - end
        return [(values[:end].view(-1, self.block), self.keep), (values[end:].view(1, rest), self._share(rest))]

    def _starts(self, numel: int, device: torch.device) -> Tensor:
        """Return for each kept element where its block starts."""
        return torch.arange(self._kept(numel), device=device) // self.keep * self.block


def _largest(rows: Tensor, keep: int) -> Tensor:
    """Return the places of the ``keep`` largest magnitudes in each row, ascending; 1D, row after row."""
    if not rows.numel():
        return torch.empty(0, dtype=torch.int64, device=rows.device)
    size = rows.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    smallest = size.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    larger, equal = size > smallest, size == smallest
    missing = keep - larger.sum(1, keepdim=True)
    chosen = larger | (equal & (equal.cumsum(1) <= missing))
    return chosen.nonzero()[:, 1]
