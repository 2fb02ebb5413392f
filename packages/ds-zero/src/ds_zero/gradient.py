"""The gradient of one flat: written by autograd, summed over ranks and accumulation steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .accumulate import TreeSum
from .layout import Layout
from .placement import Placement

if TYPE_CHECKING:
    from ds_core.protocols import Handle

    from .flat import Resources


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
        own = slice(*layout.shard_of(shared.comm.rank))
        kept = shared.placements.grad is Placement.REPLICATE
        self._params = params
        self._key = key
        self._shared = shared
        self._everywhere = shared.placements.state is Placement.REPLICATE
        # a rank's own gradient is kept only under sharded optimizer state, see [Note: Placement triple]
        self._pooled = self._everywhere or not kept
        self._leaf = torch.zeros(layout.length, dtype=dtype, device=device)  # 1D
        self._leaf_bytes = self._leaf.nbytes
        self._views = [self._leaf[slot.offset : slot.end].view(slot.shape) for slot in layout.slots]
        self._gaps = [self._leaf[start:end] for start, end in layout.gaps()]
        self._full: Tensor | None = None  # 1D, the reduced gradient on every rank
        home = None
        if self._everywhere:
            self._full = torch.zeros(layout.length, dtype=shared.gradient_dtype, device=device)
            home = self._full[own]
        elif not self._pooled and dtype == shared.gradient_dtype:
            home = self._leaf[own]
        if self._pooled:
            self._leaf.untyped_storage().resize_(0)
        self._sum = TreeSum(layout.shard_numel, shared.gradient_dtype, device, home)
        self._target: Tensor | None = None  # 1D, receives the sum over ranks that is under way

    def begin_reduce(self) -> Handle:
        """Move the parameters' gradients into the leaf and start to sum it over the ranks.

        A parameter without a gradient counts as zero. ``param.grad`` is None afterwards.
        """
        if self._pooled:
            self._shared.grad_pool.lease(self._leaf.untyped_storage(), self._leaf_bytes)
            # the memory held another unit's gradient, and gaps count in sums and norms
            for gap in self._gaps:
                gap.zero_()
        else:
            self._sum.vacate()
        for param, view in zip(self._params, self._views, strict=True):
            if param.grad is None:
                view.zero_()
            else:
                view.copy_(param.grad)
                param.grad = None
        self._target = self._sum.target()
        return self._shared.comm.reduce_scatter(self._target, self._leaf, key=self._key)

    def finish_reduce(self) -> None:
        """Take the sum over the ranks, which has arrived, as the next leaf of the summation tree."""
        if self._target is None:
            raise RuntimeError("finish_reduce() without begin_reduce()")
        self._sum.push(self._target)
        self._target = None
        if self._pooled:
            self._shared.grad_pool.release(self._leaf.untyped_storage())

    def reduced(self) -> Tensor:
        """Return this rank's shard ([S]) of the sum over all micro-batches so far."""
        total = self._sum.total()
        if total is None:
            raise RuntimeError("no gradient has been reduced since the last step: call backward() first")
        return total

    def for_optimizer(self) -> Tensor:
        """Return the sum where the optimizer works: [S], or [L] under replicated state. Communicates then."""
        if self._full is None:
            return self.reduced()
        self._shared.comm.all_gather(self._full, self.reduced(), key=self._key).wait()
        return self._full

    def clear(self) -> None:
        """Forget the sum."""
        self._sum.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held from step to step, without pooled memory."""
        leaf = 0 if self._pooled else self._leaf_bytes
        return leaf + self._sum.nbytes + (0 if self._full is None else self._full.nbytes)
