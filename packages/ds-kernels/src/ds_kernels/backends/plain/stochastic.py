"""Stochastic rounding to bfloat16, in plain torch: up or down, with the odds that leave the expectation as it is.

[Note: Keyed bits]
The random bits of an element are a hash of a key of 64 bits and of the element's index in the whole array. The key is
made of a seed, the array and the step; so the bits do not depend on threads, ranks or where the array is cut, and no
state is kept. Keys are mixed by splitmix64 (Steele, Lea and Flood, 2014), once for each 2^32 elements. Indices are
hashed by triple32 (C. Wellons, hash-prospector, 2018: three rounds of xor-shift and multiplication, found by search;
how evenly a bit of the input changes those of the output is not told from a random permutation), with half of the key
before the first round and half of it before the second. The upper 16 of its 32 bits are taken. That is good enough to
round by (tests/test_stochastic.py), costs three multiplications, and is no source of secrets.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 32) - 1
_LONG = (1 << 64) - 1
_CANONICAL_NAN = 0x7FC00000


def mixed(x: int) -> int:
    """Return splitmix64's number after ``x``: a permutation of the integers of 64 bits.

    Example:
        >>> hex(mixed(0))
        '0xe220a8397b1dcdaf'
    """
    x = (x + 0x9E3779B97F4A7C15) & _LONG
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _LONG
    return x ^ (x >> 31)


def key_of(*parts: int, first: int = 0) -> Tensor:
    """Return what a kernel takes: the key made of ``parts``, and the index of its first element in the whole array.

    Args:
        parts: Integers of 64 bits: a seed, what tells the array from others, the step.
        first: Index in the whole array, from 0.

    Returns:
        Two int64 numbers in host memory.
    """
    key = 0
    for part in parts:
        key = mixed(key ^ (part & _LONG))
    return torch.tensor([key - (key >> 63 << 64), first], dtype=torch.int64)


def round_to_bfloat16(x: Tensor, key: Tensor) -> Tensor:
    """Round float32 stochastically: to one of the two bfloat16 numbers around it, with the odds of its distances.

    What bfloat16 holds stays as it is. Above the largest number of bfloat16 the next one is infinity, as in rounding to
    nearest.

    Args:
        x: Float32, of any shape.
        key: What :func:`key_of` returned.

    Example:
        >>> x = torch.full((100_000,), 1 + 1 / 512)  # a quarter of the way from 1 to the next bfloat16
        >>> round_to_bfloat16(x, key_of(0, 1)).float().mean()
        tensor(1.0020)
    """
    bits = x.contiguous().view(-1).view(torch.int32)
    rounded = ((bits.long() & _WORD) + (random_bits(x.numel(), key, x.device) >> 16)) >> 16
    rounded = torch.where(x.reshape(-1).isnan(), _CANONICAL_NAN >> 16, rounded)
    return (rounded - ((rounded >> 15) << 16)).to(torch.int16).view(torch.bfloat16).view(x.shape)


def random_bits(numel: int, key: Tensor, device: torch.device | None = None) -> Tensor:
    """Return 32 random bits for each element, as int64; see [Note: Keyed bits]."""
    parts = []
    base, first = key.tolist()
    end = first + numel
    while first < end:
        stop = min(end, ((first >> 32) + 1) << 32)
        index = torch.arange(first & _WORD, (first & _WORD) + stop - first, device=device)
        parts.append(_hashed(index, base ^ (first >> 32)))
        first = stop
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _hashed(index: Tensor, key: int) -> Tensor:
    halves = mixed(key & _LONG)
    x = index ^ (halves & _WORD)
    x = _times(x ^ (x >> 17), 0xED5AD4BB)
    x = _times(((x ^ (x >> 11)) + (halves >> 32)) & _WORD, 0xAC4C1B51)
    x = _times(x ^ (x >> 15), 0x31848BAB)
    return x ^ (x >> 14)


def _times(x: Tensor, factor: int) -> Tensor:
    return (x * (factor - (factor >> 31 << 32))) & _WORD  # a factor with a sign, so that products fit in 64 bits
