"""How fast the links between the ranks of a pipeline are."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_SMALL = 64  # bytes
_REPEATS = 5


class Link(NamedTuple):
    """Between two ranks."""

    latency: float  # seconds, of a message of no bytes
    bytes_per_second: float  # in each direction


def link_between(group: dist.ProcessGroup, nbytes: int) -> Link:
    """Return what the slowest link between neighbours is like while nothing else runs; all ranks call it.

    Costs a dozen round trips on each link, one link after the other.

    Args:
        group: The ranks of the pipeline.
        nbytes: Of a message as it is sent in a step.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found: list[Any] = [None] * size
    mine = [0.0, 0.0]
    for first in range(size - 1):
        if rank in (first, first + 1):
            mine = [max(was, now) for was, now in zip(mine, _pair(group, first, nbytes), strict=True)]
        dist.barrier(group)
    dist.all_gather_object(found, mine, group=group)
    small, large = (max(column) for column in zip(*found, strict=True))
    return Link(small, (nbytes - _SMALL) / (large - small) if large > small and nbytes > _SMALL else float("inf"))


def _pair(group: dist.ProcessGroup, first: int, nbytes: int) -> list[float]:
    """Return the seconds of a small and of a large message, half of a round trip, between ``first`` and the next."""
    found = []
    for size in (_SMALL, nbytes):
        buffer = torch.zeros(max(1, size), dtype=torch.uint8)
        trips = [_round_trip(group, first, buffer) for _ in range(1 + _REPEATS)][1:]  # the first one warms up
        found.append(statistics.median(trips) / 2)
    return found


def _round_trip(group: dist.ProcessGroup, first: int, buffer: Tensor) -> float:
    start = time.perf_counter()
    if dist.get_rank(group) == first:
        dist.send(buffer, group=group, group_dst=first + 1)
        dist.recv(buffer, group=group, group_src=first + 1)
    else:
        dist.recv(buffer, group=group, group_src=first)
        dist.send(buffer, group=group, group_dst=first)
    return time.perf_counter() - start
