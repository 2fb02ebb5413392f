"""Random numbers as a function of a seed and an element's place, in plain torch: what they mean."""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTER_NUMBERS = 8
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def element_numbers(seed: Tensor, numel: int) -> Tensor:
    """Return the number of each of the first ``numel`` elements of a tensor.

    [Note: Element numbers]
    Element i has the 16-bit number i % 8 of the 128 bits that Philox4x32 with 10 rounds makes of counter i // 8 (its
    upper 64 bits 0) and the seed as the key, low bits first. So whether an element is dropped depends on the seed and
    on its place in the contiguous tensor, and on nothing else: the backward pass finds out again what the forward pass
    dropped, with any backend, device or number of threads. 16 bits are enough to drop with a probability that is a
    multiple of 2**-16, and eight numbers for one counter are what makes them cheap.

    Args:
        seed: 0D, int64, all 64 bits of which are the key; stays where it is, so that no device is waited for.
        numel: How many.

    Returns:
        ``[numel]``, int64, 0 to 65535.

    Example:
        >>> [hex(number) for number in element_numbers(torch.tensor(0), 4)]
        ['0xe8d5', '0x6627', '0xc58d', '0xe169']

    Reference:
        John Salmon, Mark Moraes, Ron Dror and David Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    counters = torch.arange(-(-numel // _COUNTER_NUMBERS), dtype=torch.int64, device=seed.device)
    words = [counters & _LOW, counters >> 32, torch.zeros_like(counters), torch.zeros_like(counters)]
    words = philox(words, (seed & _LOW, (seed >> 32) & _LOW))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).view(-1)[:numel]


def philox(words: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return the four words, 32 bits in int64 each, that Philox4x32 with 10 rounds makes of four words and a key."""
    k0, k1 = key
    c0, c1, c2, c3 = words
    for _ in range(10):
        # The product of two 32-bit numbers fills int64 and its sign; masks take the halves out of it.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
    return [c0, c1, c2, c3]
