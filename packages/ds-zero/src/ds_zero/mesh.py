"""Ranks on two axes, nodes and ranks of a node, and the collectives between the placements on them.

[Note: Order of shards]
Gradients are summed in the order of ranks (see [Note: Summation tree]): first over the ranks of each node, then over
nodes, which for powers of two is the one tree. Shards stand in another order: the interval of a node's i-th rank is cut
into one shard per node, so that it is contiguous and gathering it over nodes needs no copy. Shard ``i * nodes + n``
belongs to rank i of node n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import LocalCollectives, collectives_of
from .diagnosis import Diagnosis
from .layout import Layout
from .placement import Placement

if TYPE_CHECKING:
    from ds_core.kernel_protocols import ShardKernels
    from ds_core.protocols import Collectives, CompressedCollectives, Compression, Handle

    from .api import Parts
    from .config import ZeroConfig


class Then:
    """One collective after another; plays the role ``Handle``.

    What follows starts in :meth:`wait`, which is called once, and in the same order of calls on all ranks.
    """

    __slots__ = ("_first", "_then")

    def __init__(self, first: Handle, then: Callable[[], Handle]) -> None:
        self._first = first
        self._then = then

    def wait(self) -> None:
        """Return when the result of the last one may be read."""
        self._first.wait()
        self._then().wait()


class TwoLevelCollectives:
    """Plays the role ``Collectives`` for all ranks; what crosses nodes has passed through the node first.

    Between nodes each rank sends and receives 1 / (ranks of a node) of what it would in one level. ``rank`` is the
    index of this rank's shard, see [Note: Order of shards].

    Args:
        everyone: All ranks, in their own order.
        node: The ranks of this node.
        across: The ranks with this one's index on all nodes.
    """

    def __init__(self, everyone: Collectives, node: Collectives, across: Collectives) -> None:
        self._everyone = everyone
        self._node = node
        self._across = across
        self._sums: list[Tensor] = []  # over the node, float32; kept from call to call
        self.rank = node.rank * across.size + across.rank
        self.size = everyone.size

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return 1D memory to send from."""
        return self._node.allocate(numel, like)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Handle:
        """Fill ``out`` (1D) with every rank's ``shard``, in the order of shards."""
        interval = out.view(self._node.size, -1)[self._node.rank]
        over_nodes = self._across.all_gather(interval, shard, key=key)
        return Then(over_nodes, lambda: self._node.all_gather(out, interval, key=key))

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Handle:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``; the sums of nodes travel in float32."""
        numel = full.numel() // self._node.size
        fitting = [sums for sums in self._sums if sums.numel() >= numel]
        memory = fitting[0] if fitting else self._across.allocate(numel, full.new_empty(0, dtype=torch.float32))
        # what is too small for this call would only be held in vain beside the new memory
        self._sums = [sums for sums in fitting if sums is not memory]
        sums = memory[:numel]

        def reduce_over_nodes() -> Handle:
            reduction = self._across.reduce_scatter(out, sums, key=key)
            self._sums.append(memory)
            return reduction

        return Then(self._node.reduce_scatter(sums, full, key=key), reduce_over_nodes)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Handle:
        """Send ``outgoing[r]`` to the rank of shard r and fill ``incoming[r]`` from it, in one level."""
        order = [
            index * self._across.size + node for node in range(self._across.size) for index in range(self._node.size)
        ]
        return self._everyone.exchange([outgoing[r] for r in order], [incoming[r] for r in order], key=key)

    def gather_rows(self, row: Tensor) -> Tensor:
        """Return ``[size, n]``: every rank's ``row``, in the order of shards."""
        return self._node.gather_rows(self._across.gather_rows(row).view(-1)).view(self.size, -1)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with rank 0's."""
        self._everyone.broadcast(tensor)


class Holders(NamedTuple):
    """The ranks among which a buffer is cut into equal intervals, in their order."""

    comm: Collectives
    replica: int  # index of this one among all such groups of ranks
    num_replicas: int


class Mesh(NamedTuple):
    """The collectives of both axes."""

    everyone: Collectives
    node: Collectives
    across: Collectives
    compressed: tuple[CompressedCollectives, ...] = ()  # what of them compresses, from the ranks of a node outwards

    def range_of(self, placement: Placement, layout: Layout) -> tuple[int, int]:
        """Return the interval ``[start, end)`` that this rank holds of a buffer."""
        if placement is Placement.REPLICATE:
            return 0, layout.length
        if placement is Placement.NODE:
            numel = layout.length // self.node.size
            return self.node.rank * numel, (self.node.rank + 1) * numel
        return layout.shard_of(self.everyone.rank)

    def holders_of(self, placement: Placement, kernels: ShardKernels) -> Holders:
        """Return the ranks among which a buffer of this placement is cut."""
        if placement is Placement.REPLICATE:
            return Holders(LocalCollectives(kernels), self.everyone.rank, self.everyone.size)
        if placement is Placement.NODE:
            return Holders(self.node, self.across.rank, self.across.size)
        return Holders(self.everyone, 0, 1)

    def between(self, narrow: Placement, wide: Placement) -> Collectives:
        """Return the ranks over which intervals of placement ``narrow`` are gathered to one of ``wide``."""
        if narrow is Placement.NODE:
            return self.node
        return self.across if wide is Placement.NODE else self.everyone


class Joined(NamedTuple):
    """Collectives, and what is around them."""

    mesh: Mesh
    wire: Mesh  # of trained weights and their gradients: what compresses is around it
    diagnosis: Diagnosis


def mesh_of(
    group: dist.ProcessGroup | None,
    parts: Parts,
    *,
    kernels: ShardKernels,
    config: ZeroConfig,
    device: torch.device,
) -> Joined:
    """Return the mesh of ``group`` as ``config`` cuts it into nodes.

    Args:
        group: The ranks.
        parts: Collectives to use instead of ds-zero's own, if any, and what compresses.
        kernels: Ordered sums.
        config: Nodes.
        device: Where the data lie.
    """
    diagnosis, given, compression = Diagnosis(config, group), parts.collectives, parts.compression
    # ranks that compare fingerprints do not serve each other's reads meanwhile
    host_memory = config.host_memory and config.fingerprint_timeout is None
    make = partial(collectives_of, kernels=kernels, device=device, host_memory=host_memory)
    everyone = diagnosis.around(given or make(group), "all ranks")
    if not config.node_size or group is None or everyone.size == 1:
        return _joined_as_one(everyone, kernels, compression, diagnosis)
    if given is not None:
        raise ValueError("nodes (mics_shard_size, zero_hpz_partition_size) need ds-zero's own collectives")
    if everyone.size % config.node_size:
        key = "mics_shard_size" if config.mics_shard_size > 0 else "zero_hpz_partition_size"
        raise ValueError(
            f"{key} = {config.node_size}: {everyone.size} ranks are not a whole number of such nodes; use a divisor of "
            f"{everyone.size}"
        )
    if config.node_size == everyone.size:
        return _joined_as_one(everyone, kernels, compression, diagnosis)
    nodes, across = parts_of(everyone.size, config.node_size)
    own_node, own_across = (next(part for part in parts if everyone.rank in part) for parts in (nodes, across))
    node = diagnosis.around(make(group, parts=nodes), f"the node of ranks {own_node[0]} to {own_node[-1]}")
    over_nodes = diagnosis.around(make(group, parts=across), f"ranks {', '.join(map(str, own_across))} of their nodes")
    mesh = of_nodes(everyone, node, over_nodes)
    if compression is None:
        return Joined(mesh, mesh, diagnosis)
    # each level has codes of its own: what crosses nodes is the sum over a node, coded again
    levels = compression.around(node), compression.around(over_nodes)
    return Joined(mesh, of_nodes(everyone, *levels)._replace(compressed=levels), diagnosis)


def _joined_as_one(
    everyone: Collectives, kernels: ShardKernels, compression: Compression | None, diagnosis: Diagnosis
) -> Joined:
    mesh = one_node(everyone, kernels)
    if compression is None:
        return Joined(mesh, mesh, diagnosis)
    around = compression.around(everyone)
    return Joined(mesh, one_node(around, kernels)._replace(compressed=(around,)), diagnosis)


def one_node(everyone: Collectives, kernels: ShardKernels) -> Mesh:
    """Return the mesh of ranks that all count as one node."""
    return Mesh(everyone, everyone, LocalCollectives(kernels))


def of_nodes(everyone: Collectives, node: Collectives, across: Collectives) -> Mesh:
    """Return the mesh of several nodes."""
    return Mesh(TwoLevelCollectives(everyone, node, across), node, across)


def parts_of(num_ranks: int, node_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ranks of each node, and for each index those that have it.

    Example:
        >>> parts_of(4, 2)
        ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    """
    ranks = list(range(num_ranks))
    nodes = [ranks[first : first + node_size] for first in range(0, num_ranks, node_size)]
    return nodes, [ranks[index::node_size] for index in range(node_size)]
