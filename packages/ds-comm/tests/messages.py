"""Exact collectives of tagged messages, to put codes around."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from ds_testkit import Rank
from torch import Tensor


class Waiting:
    def __init__(self, works: list[dist.Work], finish: Callable[[], None] = lambda: None) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._finish()


class Messages:
    """Plays the role ``Collectives``: one message to each other rank."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.size, self._group = rank.rank, rank.size, rank.group

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        return like.new_empty(numel)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Waiting:
        slices = list(out.view(self.size, -1))
        return self._start([shard.clone()] * self.size, slices, 3 * key)

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Waiting:
        received = full.new_empty(self.size, full.numel() // self.size)
        works = self._start(list(full.view(self.size, -1)), list(received), 3 * key + 1)
        return Waiting(works._works, lambda: out.copy_(received.float().sum(0)))

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Waiting:
        return self._start(outgoing, incoming, 3 * key + 2)

    def gather_rows(self, row: Tensor) -> Tensor:
        rows = row.new_empty(self.size, row.numel())
        dist.all_gather(list(rows), row, group=self._group)
        return rows

    def broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, group=self._group, group_src=0)

    def _start(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int) -> Waiting:
        works = []
        incoming[self.rank].copy_(outgoing[self.rank])
        for peer in range(self.size):
            if peer != self.rank and incoming[peer].numel():
                works.append(dist.irecv(incoming[peer], group=self._group, group_src=peer, tag=tag))
            if peer != self.rank and outgoing[peer].numel():
                works.append(dist.isend(outgoing[peer], group=self._group, group_dst=peer, tag=tag))
        return Waiting(works)
