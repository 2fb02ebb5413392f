"""The gradient of one flat: written by autograd, summed over ranks and accumulation steps along a fixed tree; its norm.

[Note: Summation tree]
Floating-point addition is not associative, so "the same bits on any number of ranks" needs one fixed order. Leaves
are the gradients of the global micro-batches 0, 1, 2, ...; the tree adds neighbours first: ((0+1)+(2+3))+... In
accumulation step i, rank r of N computes micro-batch ``i * N + r``. The ranks' gradients of one step are therefore N
neighbouring leaves, which the reduction adds along the lower levels of the tree; :class:`TreeSum` adds the steps
along the upper levels, like a binary counter: partial sums of 1, 2, 4, ... steps, at most one of each. For every N
that is a power of two this is one and the same tree. Partial sums are shards, in float32.

[Note: Norm tree]
The squared norm of a buffer is a binary tree of float64 sums whose leaves are the sums of squares of blocks of
``LEAF`` consecutive elements. Block boundaries do not depend on where the buffer is cut into shards, so each rank
sums the subtrees that lie in its shard (``chunk_sumsq``), the few subtree roots are gathered, and the rest of the
tree is added the same way everywhere (:func:`tree_root`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .layout import Layout
from .placement import Placement

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Handle

    from .flat import Flat, Resources

_MAX_NORM_ROWS = 1 << 21
"""Subtree roots gathered at a time, 16 MB: those of 8.6e9 gradient elements. More only for a unit that has more."""


class TreeSum:
    """Binary counter of partial sums.

    At most ``log2(k) + 1`` buffers live for k leaves, one for k = 1; they are kept for the next round.

    Args:
        numel: Length of each tensor.
        dtype: Data type of the sums.
        device: Where they live.
        home: Memory to use first, or None. It may be lent out between rounds: see :meth:`vacate`.

    Example:
        >>> tree = TreeSum(1, torch.float32, torch.device("cpu"))
        >>> for leaf in (1.0, 2.0, 3.0):
        ...     tree.push(tree.target().fill_(leaf))
        >>> tree.total()
        tensor([6.])
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, home: Tensor | None = None) -> None:
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._numel = numel
        self._home = home  # 1D
        self._free = [] if home is None else [home]
        self._levels: list[Tensor | None] = []  # entry l: the sum of 2**l leaves

    def target(self) -> Tensor:
        """Return a buffer for the next leaf; its contents are arbitrary."""
        return self._free.pop() if self._free else self._like.new_empty(self._numel)

    def push(self, leaf: Tensor) -> None:
        """Add ``leaf``, a buffer obtained from :meth:`target`."""
        level = 0
        while level < len(self._levels) and (partial := self._levels[level]) is not None:
            leaf.add_(partial)
            self._levels[level] = None
            self._keep(partial)
            level += 1
        if level == len(self._levels):
            self._levels.append(None)
        self._levels[level] = leaf

    def total(self) -> Tensor | None:
        """Return the sum of all leaves, None where there are none; further leaves may still follow a ``clear``."""
        total: Tensor | None = None
        for level, partial in enumerate(self._levels):
            if partial is None:
                continue
            self._levels[level] = None
            if total is not None:
                partial.add_(total)
                self._keep(total)
            total = partial
        if total is not None:
            self._levels[-1] = total
        return total

    @property
    def single(self) -> Tensor | None:
        """The sum of all leaves, where it stands without adding anything; else None."""
        partials = [partial for partial in self._levels if partial is not None]
        return partials[0] if len(partials) == 1 else None

    def clear(self) -> None:
        """Forget all leaves; the memory stays for the next ones."""
        for partial in self._levels:
            if partial is not None:
                self._keep(partial)
        self._levels.clear()

    def vacate(self) -> None:
        """Move a partial sum out of ``home``, whose memory is about to be written by somebody else."""
        for level, partial in enumerate(self._levels):
            if partial is not None and partial is self._home:
                self._levels[level] = self.target().copy_(partial)
                self._keep(partial)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, in use or kept, without ``home``."""
        held = [b for b in [*self._free, *self._levels] if b is not None and b is not self._home]
        return sum(b.nbytes for b in held)

    def tensors(self) -> list[Tensor]:
        """Return all buffers, in use or kept."""
        return [buffer for buffer in [*self._free, *self._levels] if buffer is not None]

    def _keep(self, buffer: Tensor) -> None:
        # home on top: the next leaf is then summed where this rank's part of it already lies
        self._free.insert(len(self._free) if buffer is self._home else 0, buffer)


class FlatGradient:
    """``leaf`` and ``reduced`` of [Note: Buffers of a flat].

    Args:
        layout: Where each parameter stands.
        params: The parameters, in the order of ``layout.slots``.
        key: Number that names the buffer in communication.
        shared: Communication, memory and placements.
    """

    def __init__(self, layout: Layout, params: Sequence[nn.Parameter], *, key: int, shared: Resources) -> None:
        dtype, device = params[0].dtype, params[0].device
        mesh, grad, state = shared.mesh, shared.placements.grad, shared.placements.state
        own, held = layout.shard_of(mesh.everyone.rank), mesh.range_of(state, layout)
        self._params = params
        self._key = key
        self._shared = shared
        self._gather = mesh.between(Placement.SHARD, state)
        # a rank's own gradient is kept only under sharded optimizer state, see [Note: Placement triple]
        self._pooled = state is Placement.REPLICATE or grad is not Placement.REPLICATE
        empty = torch.empty(0, dtype=dtype, device=device)
        leaf = empty.new_empty(layout.length) if self._pooled else mesh.everyone.allocate(layout.length, empty)
        self._leaf = leaf.zero_()  # 1D
        self._leaf_bytes = self._leaf.nbytes
        self._views = [self._leaf[slot.offset : slot.end].view(slot.shape) for slot in layout.slots]
        self._gaps = [self._leaf[start:end] for start, end in layout.gaps()]
        self._full: Tensor | None = None  # 1D, the reduced gradient where the optimizer works, if that is not the shard
        home = None
        if state is not Placement.SHARD:
            self._full = torch.zeros(held[1] - held[0], dtype=shared.gradient_dtype, device=device)
            home = self._full[own[0] - held[0] : own[1] - held[0]]
        elif not self._pooled and dtype == shared.gradient_dtype:
            home = self._leaf[slice(*own)]
        if self._pooled:
            self._leaf.untyped_storage().resize_(0)
        self._sum = TreeSum(layout.shard_numel, shared.gradient_dtype, device, home)
        self._filling = False  # between the first gradient of a pass and begin_reduce
        self._accepted: set[int] = set()  # parameters whose gradients stand in the leaf
        self._target: Tensor | None = None  # 1D, receives the sum over ranks that is under way
        self._granule = layout.granule
        self._squares: Tensor | None = None  # 1D, of the sum so far, see [Note: Norm tree]

    def accept(self, index: int) -> None:
        """Take over the gradient of parameter ``index``; its ``grad`` is None afterwards.

        Called as soon as autograd has written it, while it is in the cache and so that its memory serves the next.
        """
        if not self._filling:
            self._start_leaf()
        param, view = self._params[index], self._views[index]
        if param.grad is None:
            raise RuntimeError(f"parameter {index} of shape {list(param.shape)} has no gradient to accept")
        if index in self._accepted:
            view.add_(param.grad)
        else:
            view.copy_(param.grad)
            self._accepted.add(index)
        param.grad = None

    def begin_reduce(self) -> Handle:
        """Start to sum the leaf over the ranks; a parameter without a gradient counts as zero."""
        if not self._filling:
            self._start_leaf()
        for index, param in enumerate(self._params):
            if param.grad is not None:
                self.accept(index)
            elif index not in self._accepted:
                self._views[index].zero_()
        self._filling = False
        self._accepted.clear()
        self._target = self._sum.target()
        return self._shared.wire.everyone.reduce_scatter(self._target, self._leaf, key=self._key)

    def finish_reduce(self) -> None:
        """Take the sum over the ranks, which has arrived, as the next leaf of the summation tree."""
        if self._target is None:
            raise RuntimeError("finish_reduce() without begin_reduce()")
        self._sum.push(self._target)
        # of a power of two of leaves: nothing is left to add, and the sum is still in the cache
        whole = self._sum.single
        self._squares = None if whole is None else self._shared.kernels.chunk_sumsq(whole, self._granule)
        self._target = None
        self._end_leaf()

    def reduced(self) -> Tensor:
        """Return this rank's shard ([S]) of the sum over all micro-batches so far."""
        total = self._sum.total()
        if total is None:
            raise RuntimeError(
                "no gradient has been sent since the last step: the last backward pass of a step has to send (outside "
                "no_sync, or after set_sync(enabled=True)); 1-bit optimizers take each rank's own gradient after their "
                "warm-up, and then there is no mean to be read"
            )
        return total

    def own(self) -> Tensor:
        """Return this rank's own gradient ([L]), of all passes since the last step, none of which was sent."""
        if not self._filling:
            self._start_leaf()
        for index, view in enumerate(self._views):
            if index not in self._accepted:
                view.zero_()
        return self._leaf

    def squares(self) -> Tensor:
        """Return the float64 sums of squares of :meth:`reduced`, one for each granule of the layout."""
        if self._squares is None:
            self._squares = self._shared.kernels.chunk_sumsq(self.reduced(), self._granule)
        return self._squares

    def forget_squares(self) -> None:
        """Say that :meth:`reduced` has been written from outside."""
        self._squares = None

    def for_optimizer(self) -> Tensor:
        """Return the sum over the interval of optimizer state; communicates if that is more than the shard."""
        if self._full is None:
            return self.reduced()
        self._gather.all_gather(self._full, self.reduced(), key=self._key).wait()
        return self._full

    def clear(self) -> None:
        """Forget the sum, and a leaf that was not sent."""
        self._sum.clear()
        self._squares = None
        if self._filling:
            self._filling = False
            self._accepted.clear()
            self._end_leaf()

    @property
    def nbytes(self) -> int:
        """Bytes held from step to step, without pooled memory."""
        leaf = 0 if self._pooled else self._leaf_bytes
        return leaf + self._sum.nbytes + (0 if self._full is None else self._full.nbytes)

    def tensors(self) -> list[Tensor]:
        """Return everything that holds memory; pooled memory has none between passes."""
        return [self._leaf, *([] if self._full is None else [self._full]), *self._sum.tensors()]

    def _start_leaf(self) -> None:
        self._filling = True
        if self._pooled:
            self._shared.grad_pool.lease(self._leaf.untyped_storage(), self._leaf_bytes)
            # the memory held another unit's gradient, and gaps count in sums and norms
            for gap in self._gaps:
                gap.zero_()
        else:
            self._sum.vacate()

    def _end_leaf(self) -> None:
        if self._pooled:
            self._shared.grad_pool.release(self._leaf.untyped_storage())


class GradNorm(NamedTuple):
    """Norm of the mean gradient."""

    value: float  # L2, over all parameters; not finite when any gradient is not
    culprit: str | None  # first parameter whose gradient is not finite
    squares: tuple[float, ...] = ()  # of the sums of gradients, by flat; with those of other models, one norm of all
    parts: tuple[int | None, ...] = ()  # of each of them, what ``Parts.separate`` says of its parameters
    scale: float = 1.0  # what the root of the squares is multiplied by


class NormTree:
    """Measures the norm of reduced gradients; see [Note: Norm tree].

    Args:
        flats: The trained ones.
        comm: All ranks.
    """

    def __init__(self, flats: Sequence[Flat], comm: Collectives) -> None:
        self._flats = flats
        self._comm = comm
        self._batches = _norm_batches(flats, comm.size)
        self._parts = tuple(flat.part for flat in flats)

    def measure(self, scale: float) -> GradNorm:
        """Return the L2 norm of ``scale`` times the sums; small messages (see [Note: Norm tree]).

        They take 8 bytes for each 64 to 4,096 gradient elements.
        """
        roots: list[float] = []
        for batch in self._batches:
            rows = [gradient.squares() for gradient in batch]
            gathered = self._comm.gather_rows(torch.cat(rows))
            roots += tree_root(_padded(_in_layout_order(gathered, [row.numel() for row in rows]))).tolist()
        total = math.fsum(roots)
        if math.isfinite(total):
            return GradNorm(math.sqrt(total) * scale, None, tuple(roots), self._parts, scale)
        return GradNorm(total, self._first_not_finite(roots), tuple(roots), self._parts, scale)

    def _first_not_finite(self, roots: Sequence[float]) -> str | None:
        """Name the parameter, from the squared norm of each flat, which all ranks have; communicates."""
        for flat, root in zip(self._flats, roots, strict=True):
            if flat.gradient is not None and not math.isfinite(root):
                chunks = self._comm.gather_rows(flat.gradient.squares()).reshape(-1)
                start = int(torch.nonzero(~torch.isfinite(chunks))[0]) * flat.layout.granule
                names = [overlap.slot.name for overlap in flat.layout.overlaps(start, start + flat.layout.granule)]
                return " or ".join(names)
        return None


def _in_layout_order(gathered: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Split ``[ranks, sum(widths)]`` into one vector per flat, ordered by position in the flat."""
    return [columns.reshape(-1) for columns in gathered.split(list(widths), dim=1)]


def _padded(chunks: Sequence[Tensor]) -> Tensor:
    """Stack vectors into rows of one power-of-two width; zeros at the end change no tree."""
    width = 1 << (max(chunk.numel() for chunk in chunks) - 1).bit_length()
    rows = chunks[0].new_zeros(len(chunks), width)
    for row, chunk in zip(rows, chunks, strict=True):
        row[: chunk.numel()] = chunk
    return rows


def _norm_batches(flats: Sequence[Flat], num_ranks: int) -> list[list[FlatGradient]]:
    """Group the flats so that no message of the norm grows with the model: one on most models."""
    batches: list[list[FlatGradient]] = []
    width = 0  # of the widest flat in the last batch
    for flat in flats:
        if flat.gradient is not None:
            rows = num_ranks * (flat.layout.shard_numel // flat.layout.granule)
            width = max(width, rows)
            if not batches or (len(batches[-1]) + 1) * width > _MAX_NORM_ROWS:
                batches.append([])
                width = rows
            batches[-1].append(flat.gradient)
    return batches


def tree_root(rows: Tensor) -> Tensor:
    """Add each row of ``rows`` ([n, 2**k], float64) along a binary tree; zeros behind the data change nothing.

    Example:
        >>> tree_root(torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64))
        tensor([6.], dtype=torch.float64)
    """
    while rows.shape[1] > 1:
        rows = rows[:, ::2] + rows[:, 1::2]
    return rows[:, 0]
