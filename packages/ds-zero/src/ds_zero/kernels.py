"""Plain torch forms of the kernels the partitioner calls; faster ones are passed in.

[Note: Norm tree]
The squared norm of a buffer is a binary tree of float64 sums whose leaves are the sums of squares of blocks of
``LEAF`` consecutive elements. Block boundaries do not depend on where the buffer is cut into shards, so each rank
sums the subtrees that lie in its shard (``chunk_sumsq``), the few subtree roots are gathered, and the rest of the
tree is added the same way everywhere (:func:`tree_root`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import LEAF

if TYPE_CHECKING:
    from ds_core.protocols import ShardUpdate

_SLICE = 1 << 16


class TorchKernels:
    """Kernels from torch operations, for any device."""

    def tree_sum(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        """Sum ``pieces`` in float32 along a binary tree over their order; ``out`` may be one of them.

        Example:
            >>> out = torch.empty(1)
            >>> TorchKernels().tree_sum(out, [torch.ones(1, dtype=torch.bfloat16)] * 3)
            >>> out
            tensor([3.])
        """
        level = [piece.float() for piece in pieces]
        while len(level) > 2:
            paired = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
            level = paired + level[2 * len(paired) :]
        if len(level) == 1:
            out.copy_(level[0])
        elif out.dtype == torch.float32:
            torch.add(level[0], level[1], out=out)
        else:
            out.copy_(level[0] + level[1])

    def chunk_sumsq(self, x: Tensor, chunk: int) -> Tensor:
        """Return float64 ``[len(x) // chunk]``; see [Note: Norm tree]. ``chunk`` is a power of two >= ``LEAF``.

        Example:
            >>> TorchKernels().chunk_sumsq(torch.full((128,), 2.0), 64)
            tensor([256., 256.], dtype=torch.float64)
        """
        # slices that stay in cache: a float64 copy of all of x would be written to memory and read again
        sums = torch.cat([part.double().square_().view(-1, LEAF).sum(dim=1) for part in x.split(_SLICE)])
        while sums.numel() * chunk > x.numel():
            sums = sums[::2] + sums[1::2]
        return sums


def tree_root(rows: Tensor) -> Tensor:
    """Add each row of ``rows`` ([n, 2**k], float64) along a binary tree; zeros behind the data change nothing.

    Example:
        >>> tree_root(torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64))
        tensor([6.], dtype=torch.float64)
    """
    while rows.shape[1] > 1:
        rows = rows[:, ::2] + rows[:, 1::2]
    return rows[:, 0]


def torch_update(
    optimizer: torch.optim.Optimizer, units: Sequence[Sequence[ShardUpdate]], scale: float
) -> Iterator[int]:
    """Run one step of any elementwise ``torch.optim`` optimizer: scale, step, refresh the copies.

    Costs three passes over memory where a fused kernel needs one. Yields the index of every unit at the end,
    since ``optimizer.step()`` does not say what it has finished.
    """
    updates = [update for unit in units for update in unit]
    for update in updates:
        grad = update.grad if update.grad.dtype == update.master.dtype else update.grad.to(update.master.dtype)
        update.master.grad = grad.mul_(scale)
    optimizer.step()
    for update in updates:
        update.master.grad = None
        if update.copy is not None:
            update.copy.copy_(update.master.detach())
    yield from range(len(units))
