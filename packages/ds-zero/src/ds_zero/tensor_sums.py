"""Sums of squares over whole tensors, of which each rank holds a part: for optimizers with per-tensor statistics.

[Note: Tensor tree]
The sum of squares of a tensor is a binary tree of float64 sums over blocks of :data:`BLOCK` consecutive elements of
the flattened tensor; blocks behind the end are zero. Tensors and shards begin at multiples of ``BLOCK`` in the flat
buffer (see [Note: Flat layout]), so a shard boundary never cuts a block, and the part of a tensor that a rank holds is
a run of blocks. A run is a few whole subtrees, at most two of each height: their sums are the rank's contribution.
Every rank knows from the layouts which subtrees each rank sends, gathers them all in one small message, and adds the
rest of the tree the same way. Only tensors that a boundary cuts are in the message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from .flat import Flat
    from .layout import Overlap

BLOCK = 32
"""Elements of a leaf of the tree."""

_SLICE = 1 << 16  # elements squared at a time, a multiple of BLOCK


class Node(NamedTuple):
    """A subtree: ``2**height`` blocks from ``place * 2**height`` on."""

    height: int
    place: int


class SumsOfSquares(Protocol):
    """What an optimizer with per-tensor statistics is given by ``share_sums``."""

    def __call__(self, params: Sequence[Tensor], values: Sequence[Sequence[Tensor]]) -> list[list[float]]:
        """Return sums of squares over the whole tensors of which ``params`` are parts.

        Args:
            params: Parameters of the optimizer.
            values: Lists of tensors, each like ``params``.

        Returns:
            For each list of ``values``, the sum for each parameter. All ranks call it, with as many lists.
        """


def local_sums(params: Sequence[Tensor], values: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Return the sums where parameters are whole tensors: what the optimizers use on their own.

    Example:
        >>> local_sums([torch.zeros(2)], [[torch.tensor([3.0, 4.0])]])
        [[25.0]]
    """
    del params  # each stands for itself
    sums = [subtree_sums(value, 0, _num_blocks(value.numel())) for of_kind in values for value in of_kind]
    roots = iter(torch.cat(sums).tolist()) if sums else iter(())
    # a whole tensor is one subtree, an empty one none
    return [[next(roots) if value.numel() else 0.0 for value in of_kind] for of_kind in values]


class _Part(NamedTuple):
    """What this rank holds of a tensor."""

    first: int  # block
    num_blocks: int  # of the whole tensor
    nodes: list[Node]  # of this part
    places: dict[Node, tuple[int, int]]  # rank and column in which each subtree of the tensor is gathered
    column: int  # the first one of this part


class ShardSums:
    """The sums where parameters are the parts of tensors that lie in this rank's shards.

    Communicates 8 bytes for each value and subtree of a cut tensor: at most ``2 * log2(n / 32)`` of them for a part of
    n elements, and a rank holds at most two cut tensors of each flat.

    Args:
        flats: The flats with a gradient, on every rank in the same order.
        groups: Parameter groups that want the sums.
        comm: The ranks among which optimizer state is cut.
    """

    def __init__(self, flats: Sequence[Flat], groups: Collection[int], comm: Collectives) -> None:
        self._comm = comm
        self._device = flats[0].master.device if flats else torch.device("cpu")
        places: dict[tuple[int, str], dict[Node, tuple[int, int]]] = {}  # by flat and name
        columns: dict[tuple[int, str], int] = {}  # where this rank's begin
        self._width = 0
        for rank in range(comm.size):
            column = 0
            for key, nodes in _cut_tensors(flats, groups, rank, comm.size):
                if rank == comm.rank:
                    columns[key] = column
                for node in nodes:
                    places.setdefault(key, {})[node] = (rank, column)
                    column += 1
            self._width = max(self._width, column)
        self._parts: dict[Tensor, _Part] = {}
        for index, flat in enumerate(flats):
            for segment in flat.segments:
                if segment.group in groups:
                    end = segment.start + segment.master.numel()
                    (overlap,) = flat.layout.overlaps(segment.start, end)
                    key = (index, overlap.slot.name)
                    first, num_blocks, nodes = _subtrees(overlap)
                    self._parts[segment.master] = _Part(
                        first, num_blocks, nodes, places.get(key, {}), columns.get(key, 0)
                    )

    def __call__(self, params: Sequence[Tensor], values: Sequence[Sequence[Tensor]]) -> list[list[float]]:
        """Return, for each list of ``values``, the sum of squares over the whole tensor of each parameter."""
        parts = [self._parts[param] for param in params]
        sums = [
            subtree_sums(value, part.first, part.num_blocks)
            for of_kind in values
            for part, value in zip(parts, of_kind, strict=True)
        ]
        own = iter(torch.cat(sums).tolist() if sums else [])
        row = [0.0] * (self._width * len(values))
        nodes = []  # by kind and part, the subtrees that stand here
        for kind in range(len(values)):
            for part in parts:
                mine = {node: next(own) for node in part.nodes}
                nodes.append(mine)
                if part.places:
                    start = kind * self._width + part.column
                    row[start : start + len(mine)] = mine.values()
        rows = self._gathered(row)
        for index, mine in enumerate(nodes):
            kind, part = index // len(parts), parts[index % len(parts)]
            for node, (rank, column) in part.places.items():
                mine[node] = rows[rank][kind * self._width + column]
        roots = [_root(mine, part.num_blocks) for mine, part in zip(nodes, parts * len(values), strict=True)]
        return [roots[kind * len(parts) : (kind + 1) * len(parts)] for kind in range(len(values))]

    def _gathered(self, row: Sequence[float]) -> list[list[float]]:
        if not row:
            return []
        rows: list[list[float]] = self._comm.gather_rows(
            torch.tensor(row, dtype=torch.float64, device=self._device)
        ).tolist()
        return rows


def subtree_sums(x: Tensor, first: int, num_blocks: int) -> Tensor:
    """Return the float64 sums of the subtrees that make up a run of blocks, in the order of :func:`subtrees`.

    Args:
        x: The elements, in any shape.
        first: Block of the tensor at which they begin.
        num_blocks: Blocks of the whole tensor.

    Example:
        >>> subtree_sums(torch.ones(3 * BLOCK), 1, 4)
        tensor([32., 64.], dtype=torch.float64)
    """
    sums = _block_sums(x.reshape(-1))
    low, high = first, first + sums.numel()
    if high == num_blocks:
        high = _padded(num_blocks)
    found = []
    while low < high and sums.numel():
        if low % 2:
            found.append(sums[:1])
            sums, low = sums[1:], low + 1
        if high % 2 and low < high:
            found.append(sums[-1:])
            sums, high = sums[:-1], high - 1
        if sums.numel() % 2:
            sums = torch.cat([sums, sums.new_zeros(1)])
        sums = sums[::2] + sums[1::2]
        low, high = low // 2, high // 2
    return torch.cat(found) if found else sums


def subtrees(first: int, end: int, num_blocks: int) -> Iterator[Node]:
    """Yield the fewest whole subtrees that make up the blocks ``[first, end)`` of a tensor of ``num_blocks``.

    Example:
        >>> [tuple(node) for node in subtrees(1, 4, 4)], [tuple(node) for node in subtrees(0, 5, 5)]
        ([(0, 1), (1, 1)], [(3, 0)])
    """
    low, high, height = first, _padded(num_blocks) if end == num_blocks else end, 0
    while low < high and low << height < end:
        if low % 2:
            yield Node(height, low)
            low += 1
        if high % 2 and low < high:
            high -= 1
            yield Node(height, high)
        low, high, height = low // 2, high // 2, height + 1


def _root(nodes: dict[Node, float], num_blocks: int) -> float:
    """Add what stands at the nodes along the tree; what is missing lies behind the end."""
    for height in range((_padded(num_blocks) - 1).bit_length()):
        for parent in {node.place // 2 for node in nodes if node.height == height}:
            left, right = (nodes.get(Node(height, 2 * parent + side), 0.0) for side in (0, 1))
            nodes[Node(height + 1, parent)] = left + right
    return nodes[Node((_padded(num_blocks) - 1).bit_length(), 0)]


def _cut_tensors(
    flats: Sequence[Flat], groups: Collection[int], rank: int, num_ranks: int
) -> Iterator[tuple[tuple[int, str], list[Node]]]:
    """Yield, of each tensor that ``rank`` holds a part of and not all, flat and name and the subtrees of the part."""
    for index, flat in enumerate(flats):
        for overlap in flat.layout.overlaps(*flat.layout.cut(num_ranks, rank)):
            if overlap.slot.group in groups and overlap.numel < overlap.slot.numel:
                yield (index, overlap.slot.name), _subtrees(overlap).nodes


class _Run(NamedTuple):
    """A part of a tensor, in blocks."""

    first: int
    num_blocks: int  # of the whole tensor
    nodes: list[Node]


def _subtrees(overlap: Overlap) -> _Run:
    first, num_blocks = overlap.start // BLOCK, _num_blocks(overlap.slot.numel)
    end = first + _num_blocks(overlap.numel)
    return _Run(first, num_blocks, list(subtrees(first, end, num_blocks)))


def _block_sums(x: Tensor) -> Tensor:
    """Return the float64 sums of squares of the blocks of ``x`` (1D), the last one maybe shorter."""
    whole = x.numel() - x.numel() % BLOCK
    # slices that stay in cache: a float64 copy of all of x would be written to memory and read again
    sums = [part.double().square_().view(-1, BLOCK).sum(dim=1) for part in x[:whole].split(_SLICE)]
    if whole < x.numel():
        last = x.new_zeros(1, BLOCK, dtype=torch.float64)
        last[0, : x.numel() - whole] = x[whole:]
        sums.append(last.square_().sum(dim=1))
    return torch.cat(sums)


def _num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _padded(num_blocks: int) -> int:
    return 1 << max(num_blocks - 1, 0).bit_length()
