"""Communication of one group of ranks, with sums in a fixed order.

[Note: Ordered reduce-scatter]
A backend's own reduce-scatter adds in an order that depends on the algorithm and the number of ranks. Here each
rank receives every rank's slice as it is (an all-to-all: the same volume as a ring reduce-scatter, and on gloo
faster), and adds the slices itself, in float32 along [Note: Summation tree].

[Note: Streams]
A CUDA backend runs a collective on a stream of its communicator. It starts there when what the caller's stream held at
the call is done, so no buffer is overwritten while kernels still read what it held; without that, a prefetched
gather would write into the unit that is being computed. ``wait`` makes the caller's stream wait, not the host: what is
enqueued before it overlaps. Buffers are given back only after ``wait``, and whoever takes them next writes from the
same caller's stream; without that order, a leaf would be overwritten while it is still being sent. So no events of our
own are needed. Memory comes from pools that outlive all streams: the allocator need not know which streams use it.

Memory: ``(size - 1) / size`` of the input while it is in flight. Volume per rank, sent and received: ``(size - 1) /
size`` of the input, in the input's data type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import sends_tagged
from .host import ROWS, HostCollectives, send_from_first
from .links import connect

if TYPE_CHECKING:
    from ds_core.kernel_protocols import ShardKernels
    from ds_core.protocols import Collectives


class Pending:
    """Communication under way, and what is left to do when it has arrived."""

    __slots__ = ("_finish", "_works")

    def __init__(self, works: Sequence[dist.Work | None], finish: Callable[[], None] | None = None) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written."""
        for work in self._works:
            if work is not None:
                work.wait()
        if self._finish is not None:
            self._finish()


DONE = Pending(())
"""Nothing to wait for."""

_CONNECT_SECONDS = 60.0
_MAX_PIECES = 32  # slices that a kernel adds at once; more are added row by row first


class LocalCollectives:
    """A group of one rank: data moves only where input and output differ."""

    rank = 0
    size = 1

    def __init__(self, kernels: ShardKernels) -> None:
        self._kernels = kernels

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return 1D memory of ``like``'s data type and device; arbitrary contents."""
        return like.new_empty(numel, requires_grad=False)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Pending:
        """Copy ``shard`` to ``out``."""
        del key  # nothing can be confused
        _place(out, shard)
        return DONE

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Pending:
        """Convert ``full`` into ``out``."""
        del key
        _place(out, full)
        return DONE

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Pending:
        """Copy ``outgoing[0]`` to ``incoming[0]``."""
        del key
        _place(incoming[0], outgoing[0])
        return DONE

    def gather_rows(self, row: Tensor) -> Tensor:
        """Return ``row`` as ``[1, n]``."""
        return row.unsqueeze(0)

    def broadcast(self, tensor: Tensor) -> None:
        """Keep ``tensor``."""


class _Grouped(ABC):
    """What the collectives of a real group share."""

    def __init__(self, group: dist.ProcessGroup, kernels: ShardKernels, members: Sequence[int] | None = None) -> None:
        self._group = group
        self._kernels = kernels
        self._scratch: list[Tensor] = []
        self._members = range(dist.get_world_size(group)) if members is None else members  # ranks of the group
        self.rank = self._members.index(dist.get_rank(group))
        self.size = len(self._members)

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return 1D memory of ``like``'s data type and device; arbitrary contents."""
        return like.new_empty(numel, requires_grad=False)

    @abstractmethod
    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Pending:
        """Fill ``out`` (1D) with every rank's ``shard``, which may be its own slice of ``out``."""

    @abstractmethod
    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Pending:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``."""

    @abstractmethod
    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Pending:
        """Send ``outgoing[r]`` (1D) to each rank r and fill ``incoming[r]`` from it."""

    def gather_rows(self, row: Tensor) -> Tensor:
        """Return ``[size, n]``: every rank's ``row``."""
        rows = row.new_empty(self.size, row.numel())
        self.all_gather(rows.view(-1), row, key=ROWS).wait()
        return rows

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with rank 0's."""
        if self.size == dist.get_world_size(self._group):
            dist.broadcast(tensor, group=self._group, group_src=0)
        else:
            send_from_first(self, tensor)

    def _borrow(self, like: Tensor, numel: int) -> Tensor:
        """Return a 1D receive buffer; kept from call to call, since fresh memory costs page faults."""
        for index, buffer in enumerate(self._scratch):
            if buffer.dtype == like.dtype and buffer.numel() >= numel:
                return self._scratch.pop(index)
        # what is too small for this taker would only be held in vain beside the new memory
        self._scratch = [buffer for buffer in self._scratch if buffer.dtype != like.dtype]
        return like.new_empty(numel)

    def _slices(self, flat: Tensor) -> list[Tensor]:
        return list(flat.view(self.size, -1).unbind())

    def _sum_then_return(self, out: Tensor, pieces: list[Tensor], scratch: Tensor) -> Callable[[], None]:
        def finish() -> None:
            self._kernels.tree_sum(out, pieces)
            self._scratch.append(scratch)

        return finish


class PeerCollectives(_Grouped):
    """Direct messages between each pair of ranks, for backends whose sends carry tags (gloo, MPI, ds_shm).

    No slice is copied within a rank, and calls with different keys may be issued in different orders on
    different ranks: messages are matched by tag.
    """

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Pending:
        """Fill ``out`` (1D) with every rank's ``shard``, which may be its own slice of ``out``."""
        slices = self._slices(out)
        works = self._messages([shard] * self.size, slices, tag=2 * key)
        _place(slices[self.rank], shard)
        return Pending(works)

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Pending:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``; see [Note: Ordered reduce-scatter]."""
        slices = self._slices(full)
        numel = out.numel()
        own = slices[self.rank]
        # one slice can be received where the sum will stand, unless this rank's own is there already
        direct = [out] if out.dtype == full.dtype and out.data_ptr() != own.data_ptr() else []
        num_others = self.size - 1 - len(direct)
        scratch = self._borrow(full, num_others * numel)
        received = direct + list(scratch[: num_others * numel].view(num_others, numel).unbind())
        received.insert(self.rank, own)
        works = self._messages(slices, received, tag=2 * key + 1)
        return Pending(works, self._sum_then_return(out, received, scratch))

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Pending:
        """Send ``outgoing[r]`` (1D) to each rank r and fill ``incoming[r]`` from it; nothing is sent of empty ones."""
        works = self._messages(outgoing, incoming, tag=2 * key)
        _place(incoming[self.rank], outgoing[self.rank])
        return Pending(works)

    def _messages(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int) -> list[dist.Work | None]:
        works: list[dist.Work | None] = []
        for distance in range(1, self.size):
            src, dst = (self.rank - distance) % self.size, (self.rank + distance) % self.size
            if incoming[src].numel():
                works.append(dist.irecv(incoming[src], group=self._group, group_src=self._members[src], tag=tag))
            if outgoing[dst].numel():
                works.append(dist.isend(outgoing[dst], group=self._group, group_dst=self._members[dst], tag=tag))
        return works


class DenseCollectives(_Grouped):
    """One collective operation per call, for backends without tagged messages (NCCL, threads, fake ranks).

    Args:
        group: The ranks.
        kernels: Ordered sums.
        reductions: A group of the same ranks with a communicator of its own, or None. Operations on one communicator
            run one after the other: a gather asked for ahead of need would wait for the reductions before it.
    """

    def __init__(
        self, group: dist.ProcessGroup, kernels: ShardKernels, reductions: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(group, kernels)
        self._reductions = reductions or group
        # torch 2.13 renamed it, and warns of the old name
        self._all_gather = vars(dist).get("all_gather_single", dist.all_gather_into_tensor)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Pending:
        """Fill ``out`` (1D) with every rank's ``shard``, which may be its own slice of ``out``."""
        del key  # these backends match calls by their order
        return Pending((self._all_gather(out, shard, group=self._group, async_op=True),))

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Pending:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``; see [Note: Ordered reduce-scatter]."""
        del key
        scratch = self._borrow(full, full.numel())
        received = scratch[: full.numel()]
        work = dist.all_to_all_single(received, full, group=self._reductions, async_op=True)
        rows = received.view(self.size, -1)
        if self.size <= _MAX_PIECES:
            return Pending((work,), self._sum_then_return(out, list(rows.unbind()), scratch))

        def finish() -> None:
            # on thousands of ranks: a few operations on matrices, not one on each rank's slice
            self._kernels.tree_sum(out, list(_fold(rows, _MAX_PIECES).unbind()))
            self._scratch.append(scratch)

        return Pending((work,), finish)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Pending:
        """Send ``outgoing[r]`` (1D) to each rank r and fill ``incoming[r]`` from it; any may be empty."""
        del key
        return Pending((dist.all_to_all(list(incoming), list(outgoing), group=self._group, async_op=True),))


def collectives_of(
    group: dist.ProcessGroup | None,
    kernels: ShardKernels,
    *,
    device: torch.device,
    host_memory: bool = True,
    parts: Sequence[Sequence[int]] | None = None,
) -> Collectives:
    """Return the collectives that suit ``group``: its backend and its ranks' hosts decide. All ranks call it.

    Args:
        group: The ranks; None is a single process.
        kernels: Ordered sums.
        device: Where the data lie.
        host_memory: Whether ranks that all run on one host may read each other's memory, for data on CPU.
        parts: Disjoint sets of ranks of ``group``, the same on every rank, that communicate among themselves; one
            contains this rank. None: all ranks are one set.

    Raises:
        ValueError: ``parts`` need groups of their own, and ``group`` is not all ranks.
    """
    if group is None:
        return LocalCollectives(kernels)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    members = next(part for part in parts or [range(size)] if rank in part)
    if not sends_tagged(group):
        own = group if parts is None else _own_group(group, parts)
        if len(members) == 1:
            return LocalCollectives(kernels)
        # NCCL makes groups with all ranks only; a group of some has one communicator
        apart = dist.get_backend(group) == "nccl" and size == dist.get_world_size()
        return DenseCollectives(own, kernels, _own_group(group, parts or [range(size)]) if apart else None)
    # called by ranks that are alone, too: all ranks of the group learn where all are
    sockets = connect(group, members, _CONNECT_SECONDS) if host_memory and device.type == "cpu" and size > 1 else None
    if len(members) == 1:
        return LocalCollectives(kernels)
    if sockets is None:
        return PeerCollectives(group, kernels, members)
    timeout = group._get_backend(device).options._timeout
    return HostCollectives(group, members, sockets, kernels, timeout.total_seconds())


def _own_group(group: dist.ProcessGroup, parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Return a process group of the part that holds this rank."""
    if dist.get_world_size(group) != dist.get_world_size():
        raise ValueError(
            f"nodes of a group of {dist.get_world_size(group)} among {dist.get_world_size()} ranks: the backend "
            f"{dist.get_backend(group)!r} makes groups with all ranks only; use all of them, or no nodes"
        )
    groups: list[dist.ProcessGroup] = [dist.new_group(list(part)) for part in parts]
    return next(made for made, part in zip(groups, parts, strict=True) if dist.get_rank() in part)


def _place(out: Tensor, source: Tensor) -> None:
    if out.data_ptr() != source.data_ptr():
        out.copy_(source)


def _fold(rows: Tensor, limit: int) -> Tensor:
    """Add neighbouring rows in float32, level by level of the summation tree, until at most ``limit`` are left.

    Overwrites ``rows`` if they are float32; otherwise takes half their number of elements of new memory.

    Example:
        >>> _fold(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]]), 3)
        tensor([[ 3.],
                [12.],
                [16.]])
    """
    while rows.shape[0] > limit:
        even, odd = rows[::2].float(), rows[1::2]
        even[: odd.shape[0]].add_(odd)
        rows = even
    return rows
