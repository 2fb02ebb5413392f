"""Random numbers that depend on a key only.

[Note: Keys]
Dropout draws from torch's default generators, whose state depends on all that was drawn before on this rank: so on
where the model is cut, and on the schedule. With a key each layer draws from a state that follows from the seed, the
number of the micro-batch and the layer's index in the whole model: the same numbers however many stages there are,
whatever runs in between, and when a layer is recomputed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Key(NamedTuple):
    """See [Note: Keys]."""

    seed: int
    micro_batch: int  # its number in the whole run


def draw_from(key: Key, layer: int) -> None:
    """Set the default generators for one layer; within :func:`kept_generators`."""
    # hashed, so that neighbouring keys start unrelated streams
    digest = hashlib.blake2b(f"{key.seed} {key.micro_batch} {layer}".encode(), digest_size=8).digest()
    seed_generators(int.from_bytes(digest, "little", signed=True))


def seed_generators(seed: int) -> None:
    """Set the default generators of the CPU and, where it is in use, of the current GPU."""
    for generator in _generators():
        generator.manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the default generators back afterwards.

    Example:
        >>> before = torch.random.initial_seed()
        >>> with kept_generators():
        ...     draw_from(Key(seed=1, micro_batch=17), 0)
        ...     first = torch.rand(2)
        >>> with kept_generators():
        ...     draw_from(Key(seed=1, micro_batch=17), 0)
        ...     bool((torch.rand(2) == first).all())
        True
        >>> torch.random.initial_seed() == before
        True
    """
    generators = _generators()
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators() -> list[torch.Generator]:
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found
