"""Where the seeds of dropout come from.

[Note: Seeds]
Each forward pass that drops something draws one 63-bit seed from torch's default generator of the tensor's device. So
masks are fresh, ``torch.manual_seed`` repeats a run, and activation checkpointing, which puts generators back before it
computes again, gives the same bits; an engine that keys generators keys dropout, too. The seed is a tensor on the
device: no device is waited for, a captured CUDA graph draws anew at each replay, and 8 bytes are all that the backward
pass keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_seed

_LARGEST = (1 << 63) - 1


def seed_for(x: Tensor, p: float, seed: Tensor | None, *, training: bool) -> Tensor | None:
    """Return the seed of a dropout of ``x``: the caller's or a new one; None where nothing or everything is dropped.

    Raises:
        ValueError: If ``p`` is no probability, or ``seed`` not a number on the device of ``x``.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be at least 0 and at most 1; got {p}")
    if seed is not None:
        check_seed(seed, x.device)
    if p in (0, 1) or not training:
        return None
    return torch.randint(_LARGEST, (), dtype=torch.int64, device=x.device) if seed is None else seed


def cleared(x: Tensor) -> Tensor:
    """Return zeros like ``x``, to which it gets the gradient 0: what a dropout of everything leaves."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)
