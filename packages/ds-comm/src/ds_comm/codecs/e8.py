"""One bit for each element, with an exact zero: eight elements become a short vector of the lattice E8.

[Note: E8 payload]
As in [Note: Block payload]: all scales come first (float32), then the bytes of one block after the other; of a block of
``k`` elements there are ``m = ceil(k / 8)`` bytes, and byte ``j`` stands for its elements ``j``, ``j + m``, ...,
``j + 7 m``, in this order 0 ... 7; what is behind the end is 0. A byte stands for, times the scale,

======================================= ==============================================================================
byte                                    vector
======================================= ==============================================================================
0 ... 126                               *halves*: eight times +-1/2, an even number of them negative; bit i, up to 6,
                                        is set where element i is
127                                     nothing: zeros (as halves it would be all negative)
128 + 4 (q (q - 1) / 2 + p) + 2 s + t   *a pair*: +-1 at p and at q, p < q; s and t are 1 where q and p are negative
240 + 2 p + t                           *a single*: +-1 at p; t is 1 where it is negative
======================================= ==============================================================================

Halves and pairs are the 240 shortest vectors of E8 but one. Of a group of eight the better of both is what has the
larger inner product with the magnitudes: ``a1 + a2`` of the two largest for a pair, ``(sum - 2 min [odd]) / 2`` for
halves, where the smallest takes the other sign if the number of negatives is odd. Halves are never taken for a group
with a zero. With the scale s, the nearest of that vector, a single and nothing is sent. A scale is the sum of the inner
products of what is sent over that of the squared lengths; at first for the better vectors of all groups that are not
zero, then twice for what it makes of them.

Magnitudes are compared without their last three bits, which hold the place: of equal ones the last is the largest, and
the first the smallest. Sums over the groups of a block run as in ``digits.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .digits import lane_sum
from .layout import Layout, check_block
from .native import native_codes
from .plain import PlainCodec

__all__ = ["E8Codec"]

_CHUNK = 1 << 17  # elements that are coded at once: their temporaries stay in cache
_BEST = True  # native code for this processor
_PLACE = 7  # bits of a magnitude that hold its place
_NOTHING = 127
_PAIRS, _SINGLES = 128, 240


@dataclass(frozen=True, kw_only=True, slots=True)
class E8Codec(PlainCodec):
    """Plays the role ``Codec``: a byte for every eight elements, and a scale for each block.

    Of the size of ``BlockCodec(code="sign")``, it loses less, and zeros stay zeros: see [Note: E8 payload]. Bytes of
    1024 elements, blocks of 512: 136. Two hops of it, as in a compressed all-reduce, take 0.266 bytes per element.

    Where the wheel was built with a C++ compiler, tensors on CPU are coded by native code, one thread and no
    temporaries; otherwise by torch operations with 4 temporaries of float32 for each 131072 elements. The bytes are the
    same.

    Example:
        >>> codec, x = E8Codec(), torch.zeros(512)
        >>> x[:2] = torch.tensor([3.0, -3.0])
        >>> len(codec.encode(x)), torch.equal(codec.decode(codec.encode(x), torch.empty(512)), x)
        (68, True)

    Reference:
        John Conway and Neil Sloane, Fast quantizing and decoding algorithms for lattice quantizers and codes, 1982.
        Albert Tseng and others, QuIP#, 2024 (E8 for weights).
    """

    block: int = 512
    """Consecutive elements that share a scale: a multiple of 64 in 64 ... 1024."""

    def __post_init__(self) -> None:
        check_block(self.block)

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements.

        Example:
            >>> E8Codec().payload_bytes(1_000_000)
            132816
        """
        return self._layout.payload_bytes(numel)

    @property
    def _layout(self) -> Layout:
        return Layout("sign", self.block, torch.float32)  # eight to a byte, too

    def _encode(self, x: Tensor, error: Tensor | None, payload: Tensor) -> None:
        codes = native_codes(x.device)
        if codes is None:
            PlainCodec._encode(self, x, error, payload)
            return
        x, table = x.to(torch.float32), _vectors(x.device)
        owed = 0 if error is None else error.data_ptr()
        codes.e8_encode(_BEST, x.data_ptr(), owed, payload.data_ptr(), x.numel(), self.block, table.data_ptr())
        torch.autograd.graph.increment_version([payload] if error is None else [payload, error])

    def _decode(self, payload: Tensor, out: Tensor) -> None:
        codes = native_codes(out.device)
        if codes is None or out.dtype != torch.float32:
            PlainCodec._decode(self, payload, out)
            return
        table = _vectors(out.device)
        codes.e8_decode(_BEST, out.data_ptr(), payload.data_ptr(), out.numel(), self.block, table.data_ptr())
        torch.autograd.graph.increment_version(out)

    def _accumulate(self, payload: Tensor, out: Tensor, scale: float) -> None:
        codes = native_codes(out.device)
        if codes is None:
            PlainCodec._accumulate(self, payload, out, scale)
            return
        table = _vectors(out.device)
        codes.e8_accumulate(_BEST, out.data_ptr(), payload.data_ptr(), out.numel(), self.block, table.data_ptr(), scale)
        torch.autograd.graph.increment_version(out)

    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        sent, table = torch.empty_like(values), _vectors(values.device)
        for part in self._layout.parts(values.numel()):
            rows, out = (each[part.elements].view(part.blocks, -1) for each in (values, sent))
            scales, codes = payload[part.scales].view(part.blocks, -1), payload[part.codes].view(part.blocks, -1)
            for chunk in _chunks(part.blocks, part.length):
                coded = _code_groups(_groups(rows[chunk], codes.shape[1]))
                scales[chunk] = coded.scales.view(torch.uint8)
                codes[chunk] = coded.codes
                _write(coded.codes, coded.scales, table, out[chunk])
        return sent

    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        found, table = torch.empty(numel, device=payload.device), _vectors(payload.device)
        for part in self._layout.parts(numel):
            # cloned: a payload within a message need not be aligned for floats
            scales = payload[part.scales].clone().view(torch.float32).mul_(factor).unsqueeze(1)
            codes, out = payload[part.codes].view(part.blocks, -1), found[part.elements].view(part.blocks, -1)
            for chunk in _chunks(part.blocks, part.length):
                _write(codes[chunk], scales[chunk], table, out[chunk])
        return found


class _Coded(NamedTuple):
    codes: Tensor  # [blocks, m], uint8
    scales: Tensor  # [blocks, 1], float32


class _Ranked(NamedTuple):
    """Magnitudes of every group, less their last three bits, and their places (int32); all [blocks, m]."""

    largest: Tensor
    second: Tensor
    smallest: Tensor
    at_largest: Tensor
    at_second: Tensor
    at_smallest: Tensor


class _Better(NamedTuple):
    """Halves or a pair for every group; all [blocks, m]."""

    product: Tensor  # inner product with the group, float32
    codes: Tensor  # int32


def _chunks(blocks: int, length: int) -> Iterator[slice]:
    step = max(1, _CHUNK // length)
    for start in range(0, blocks, step):
        yield slice(start, start + step)


def _code_groups(groups: Tensor) -> _Coded:
    """Code ``[8, blocks, m]``: for each place in a group its elements."""
    size = groups.abs()
    ranked, negative = _ranked(size), _bits(groups < 0)
    better = _better(size, negative, ranked)
    total = lane_sum(better.product)
    scales = total / (2 * lane_sum((better.product > 0).to(torch.float32))).clamp_(min=1)
    for _ in range(2):
        is_better, is_single = _nearest(better.product, ranked.largest, scales)
        lengths = lane_sum(is_better * 2.0 + is_single)
        products = lane_sum(better.product.where(is_better, ranked.largest.where(is_single, 0)))
        scales = torch.where(lengths > 0, products / lengths, scales)
    is_better, is_single = _nearest(better.product, ranked.largest, scales)
    single = _SINGLES + 2 * ranked.at_largest + _bit(negative, ranked.at_largest)
    codes = better.codes.where(is_better, single.where(is_single, _NOTHING))
    # what is not finite shows in the scale
    return _Coded(codes.to(torch.uint8), scales.where(total.isfinite(), total))


def _ranked(size: Tensor) -> _Ranked:
    keys = size.view(torch.int32) & ~_PLACE
    keys |= torch.arange(8, dtype=torch.int32, device=size.device).view(8, 1, 1)
    largest, second = torch.maximum(keys[0], keys[1]), torch.minimum(keys[0], keys[1])
    smallest = second.clone()
    for key in keys[2:]:
        torch.maximum(second, torch.minimum(largest, key), out=second)
        torch.maximum(largest, key, out=largest)
        torch.minimum(smallest, key, out=smallest)
    found = (largest, second, smallest)
    return _Ranked(*((key & ~_PLACE).view(torch.float32) for key in found), *(key & _PLACE for key in found))


def _better(size: Tensor, negative: Tensor, ranked: _Ranked) -> _Better:
    odd = negative ^ (negative >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    signs = negative ^ (odd << ranked.at_smallest)
    sums = size[:4] + size[4:]
    sums = sums[:2] + sums[2:]
    halves, pair = (sums[0] + sums[1]) * 0.5 - ranked.smallest * odd, ranked.largest + ranked.second
    is_halves = (halves > pair) & (ranked.smallest > 0) & (signs != 255)
    p, q = torch.minimum(ranked.at_largest, ranked.at_second), torch.maximum(ranked.at_largest, ranked.at_second)
    pairs = _PAIRS + 4 * ((q * (q - 1) >> 1) + p) + 2 * _bit(negative, q) + _bit(negative, p)
    return _Better(halves.where(is_halves, pair), (signs & _NOTHING).where(is_halves, pairs))


def _nearest(better: Tensor, single: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the better vector, and where the single is nearest, by their inner products with the group."""
    half = scales * 0.5
    is_better = (better - single > half) & (better > scales)
    return is_better, (single > half) & ~is_better


def _bits(flags: Tensor) -> Tensor:
    """Return ``[blocks, m]``, int32: bit ``i`` is ``flags[i]``."""
    bits = flags[0].to(torch.int32)
    for i, flag in enumerate(flags[1:], start=1):
        bits.add_(flag, alpha=1 << i)
    return bits


def _bit(bits: Tensor, place: Tensor) -> Tensor:
    return (bits >> place) & 1


# Elements and groups #


def _groups(rows: Tensor, m: int) -> Tensor:
    """Return ``[8, blocks, m]``, contiguous, of ``[blocks, length]``; zeros behind the end."""
    rest = 8 * m - rows.shape[1]
    whole = F.pad(rows, (0, rest)) if rest else rows
    return whole.view(-1, 8, m).transpose(0, 1).contiguous()


def _write(codes: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    """Write what ``codes`` (``[blocks, m]``) stand for, times ``scales``, into ``out`` (``[blocks, length]``)."""
    blocks, m = codes.shape
    indices = codes.reshape(-1).to(torch.int32)
    for i, values in enumerate(table):
        part = out[:, i * m : (i + 1) * m]
        torch.mul(values.index_select(0, indices).view(blocks, m)[:, : part.shape[1]], scales, out=part)


@cache
def _vectors(device: torch.device) -> Tensor:
    """Return ``[8, 256]``: for each byte its vector. See [Note: E8 payload]."""
    vectors = torch.zeros(256, 8)
    for code in range(_NOTHING):
        signs = code | (code.bit_count() & 1) << 7
        vectors[code] = torch.tensor([-0.5 if signs >> i & 1 else 0.5 for i in range(8)])
    for q in range(8):
        for p in range(q):
            for s, t in itertools.product((0, 1), (0, 1)):
                code = _PAIRS + 4 * (q * (q - 1) // 2 + p) + 2 * s + t
                vectors[code, q], vectors[code, p] = 1 - 2 * s, 1 - 2 * t
        for t in (0, 1):
            vectors[_SINGLES + 2 * q + t, q] = 1 - 2 * t
    return vectors.t().contiguous().to(device)
