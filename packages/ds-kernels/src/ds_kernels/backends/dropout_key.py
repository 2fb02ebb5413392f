"""How a probability becomes a threshold of 16-bit numbers, the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NUMBERS = 1 << 16
"""How many different numbers an element may have; see [Note: Element numbers] in ``plain/philox.py``."""


class DropoutTerms(NamedTuple):
    """What a dropout does with an element's number."""

    threshold: int  # elements with a smaller number are dropped; 0: none
    scale: float  # of those that stay: 1 / (1 - threshold / 65536)


def dropout_terms(p: float, seed: Tensor | None) -> DropoutTerms:
    """Return the terms for the probability ``p``; without a seed nothing is dropped.

    Example:
        >>> dropout_terms(0.5, None), dropout_terms(0.75, Tensor())
        (DropoutTerms(threshold=0, scale=1.0), DropoutTerms(threshold=49152, scale=4.0))
    """
    threshold = 0 if seed is None else min(round(p * NUMBERS), NUMBERS - 1)
    return DropoutTerms(threshold, NUMBERS / (NUMBERS - threshold))
