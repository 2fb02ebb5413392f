"""Collectives that count what they send, around any others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What is counted apart."""

    op: str
    axis: str  # the group, as its owner named it: "world", or "node" and "across" on a mesh of two axes


class Traffic:
    """Calls, and bytes and elements that this rank sends, by operation and group.

    A rank sends its part to each of the others, or, in a ring, passes on as much: ``(size - 1) / size`` of the whole.
    A broadcast counts as the whole, once.
    """

    def __init__(self) -> None:
        self.calls: Counter[Call] = Counter()
        self.elements: Counter[Call] = Counter()
        self.nbytes: Counter[Call] = Counter()

    def add(self, call: Call, sent: int, dtype: torch.dtype) -> None:
        """Count one call."""
        self.calls[call] += 1
        self.elements[call] += sent
        self.nbytes[call] += sent * dtype.itemsize

    def clear(self) -> None:
        """Start anew."""
        for counter in (self.calls, self.elements, self.nbytes):
            counter.clear()


class CountedCollectives:
    """Plays the role ``Collectives``: passes each call on and counts it.

    Args:
        inner: Does the work.
        traffic: Takes the counts; several groups may share one.
        axis: Name of this group in it.
    """

    def __init__(self, inner: Any, traffic: Traffic, axis: str = "world") -> None:
        self._inner = inner
        self._traffic = traffic
        self._axis = axis
        self.rank: int = inner.rank
        self.size: int = inner.size

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        memory: Tensor = self._inner.allocate(numel, like)
        return memory

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Any:
        self._count("all_gather", (self.size - 1) * shard.numel(), shard)
        return self._inner.all_gather(out, shard, key=key)

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Any:
        self._count("reduce_scatter", (self.size - 1) * (full.numel() // self.size), full)
        return self._inner.reduce_scatter(out, full, key=key)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Any:
        sent = sum(part.numel() for rank, part in enumerate(outgoing) if rank != self.rank)
        self._count("exchange", sent, incoming[self.rank])
        return self._inner.exchange(outgoing, incoming, key=key)

    def gather_rows(self, row: Tensor) -> Tensor:
        self._count("gather_rows", (self.size - 1) * row.numel(), row)
        rows: Tensor = self._inner.gather_rows(row)
        return rows

    def broadcast(self, tensor: Tensor) -> None:
        self._count("broadcast", tensor.numel(), tensor)
        self._inner.broadcast(tensor)

    def _count(self, op: str, sent: int, like: Tensor) -> None:
        self._traffic.add(Call(op, self._axis), sent, like.dtype)
