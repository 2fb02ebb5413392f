"""Bytes between all ranks of a group, by the backend's collectives or, over gloo, by messages of our own.

[Note: Posted messages]
Over gloo, a collective sends before its receivers are known to wait, and what is sent so can take longer than its
bytes. Here every rank says first what it expects, so that a message finds its receiver waiting. Gloo has such messages
for memory of the CPU only; elsewhere its collectives are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0x6473  # of our messages, so that they are not taken for a program's own


class Exchange(Protocol):
    """One message from each rank to each. Called once: :meth:`send` or :meth:`spread`, then :meth:`wait`."""

    def send(self, sent: Tensor) -> None:
        """Send row i of ``sent`` to rank i. It must not change before :meth:`wait` has returned."""

    def spread(self, own: Tensor) -> None:
        """Send ``own`` to all ranks. It must not change before :meth:`wait` has returned."""

    def wait(self) -> None:
        """Return when all messages have arrived and been sent."""


Expect = Callable[[Tensor], Exchange]  # of the rows where messages go, by rank; in the same order on all ranks


def exchanges(group: dist.ProcessGroup | None, device_type: str) -> Expect:
    """Return what begins an exchange between the ranks of ``group``.

    Args:
        group: gloo, NCCL, MPI, or any backend with ``all_to_all_single``; None: all ranks.
        device_type: Where messages lie.
    """
    kind = _Posted if posts(dist.get_backend_config(group), device_type) else _Collective
    return lambda received: kind(received, group)


def posts(config: str, device_type: str) -> bool:
    """Return whether messages are posted; see [Note: Posted messages].

    Args:
        config: Of a group, from ``torch.distributed.get_backend_config``: a backend for each device type. A plain gloo
            group names itself for GPUs, too.
        device_type: Where messages lie.

    Example:
        >>> posts("cpu:gloo,cuda:gloo", "cpu"), posts("cpu:gloo,cuda:gloo", "cuda"), posts("cpu:mpi", "cpu")
        (True, False, False)
    """
    return device_type == "cpu" and _backends(config).get("cpu") == "gloo"


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return a device whose memory ``group`` exchanges: the CPU where it can, otherwise the current one of its type."""
    types = _backends(dist.get_backend_config(group))
    return torch.device("cpu" if "cpu" in types else next(iter(types)))


def _backends(config: str) -> dict[str, str]:
    return dict(entry.split(":") for entry in config.split(","))


class _Posted:
    """See [Note: Posted messages]."""

    def __init__(self, received: Tensor, group: dist.ProcessGroup | None) -> None:
        self._received, self._group = received, group
        rank, size = dist.get_rank(group), len(received)
        self._rank = rank
        self._others = [(rank + away) % size for away in range(1, size)]
        self._works = [
            dist.irecv(received[peer], group=group, group_src=peer, tag=_TAG) for peer in reversed(self._others)
        ]

    def send(self, sent: Tensor) -> None:
        self._works += [dist.isend(sent[peer], group=self._group, group_dst=peer, tag=_TAG) for peer in self._others]
        self._received[self._rank].copy_(sent[self._rank])

    def spread(self, own: Tensor) -> None:
        self.send(own.expand_as(self._received))

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()


class _Collective:
    """By the backend's own operations."""

    def __init__(self, received: Tensor, group: dist.ProcessGroup | None) -> None:
        self._received, self._group = received, group
        self._work: dist.Work | None = None

    def send(self, sent: Tensor) -> None:
        self._work = dist.all_to_all_single(self._received.view(-1), sent.view(-1), group=self._group, async_op=True)

    def spread(self, own: Tensor) -> None:
        self._work = dist.all_gather(list(self._received.unbind()), own, group=self._group, async_op=True)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
