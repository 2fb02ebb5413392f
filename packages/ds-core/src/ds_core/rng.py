"""Random numbers of the forward pass, keyed by the global micro-batch instead of by the rank.

[Note: Keyed randomness]
Dropout draws from torch's default generators, whose state depends on everything drawn before on this rank. Here
each forward pass in training starts from a state that depends on the run's seed, the global index of the
micro-batch and the number of forward passes of it so far. So micro-batch 17 sees the same dropout mask whichever
rank computes it, after a resize and after a resume. The generators' own states are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MASK = (1 << 63) - 1


@contextmanager
def keyed(seed: int, index: int, repeat: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from streams that depend on the arguments only.

    Args:
        seed: Of the run.
        index: Global index of the micro-batch.
        repeat: Forward passes of this micro-batch before this one.
        device: Where the model is; its generator and the CPU's are keyed.

    Example:
        >>> with keyed(1, 17, 0, torch.device("cpu")):
        ...     first = torch.rand(2)
        >>> _ = torch.rand(3)
        >>> with keyed(1, 17, 0, torch.device("cpu")):
        ...     bool((torch.rand(2) == first).all())
        True
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(_mix(seed, index, repeat))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _mix(*numbers: int) -> int:
    """Hash integers into 63 bits, so that neighbouring keys start unrelated streams.

    The mixing step is SplitMix64's (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014).
    """
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK
