"""State that partitioned models export, put together again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[tuple[str, str], Tensor]
"""Whole tensors, flattened, by role and name."""


class Exported(NamedTuple):
    """A piece as it travels between processes: a copy, no view of live memory."""

    name: str
    role: str
    shape: torch.Size
    start: int
    data: Tensor


def exported(sharded: Any) -> list[Exported]:
    """Copy the pieces of one rank."""
    return copied(sharded.state().pieces)


def copied(pieces: Iterable[Any]) -> list[Exported]:
    """Copy pieces."""
    return [Exported(p.name, p.role, p.shape, p.start, p.data.clone()) for p in pieces]


def assembled(ranks: Iterable[Iterable[Exported]]) -> State:
    """Put the pieces of all ranks together; every element has to stand exactly once."""
    whole: State = {}
    counts: dict[tuple[str, str], Tensor] = {}
    for piece in (piece for pieces in ranks for piece in pieces):
        key, place = (piece.role, piece.name), slice(piece.start, piece.start + piece.data.numel())
        whole.setdefault(key, piece.data.new_zeros(piece.shape.numel()))[place] = piece.data
        counts.setdefault(key, torch.zeros(piece.shape.numel(), dtype=torch.int))[place] += 1
    for key, count in counts.items():
        assert bool((count == 1).all()), f"{key}: elements missing or doubled"
    return whole


def assert_same_bits(got: State, want: State) -> None:
    """Every tensor is there, and equal bit for bit."""
    assert got.keys() == want.keys()
    different = [key for key in want if not torch.equal(got[key], want[key])]
    assert not different, f"not equal bit for bit: {different}"
