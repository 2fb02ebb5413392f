"""The optimizer step over shards in plain torch; a fused kernel is passed in instead where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ds_core.protocols import ShardUpdate


def torch_update(
    optimizer: torch.optim.Optimizer, units: Sequence[Sequence[ShardUpdate]], scale: float
) -> Iterator[int]:
    """Run one step of any optimizer over what it was made for: scale the gradients, step, refresh the copies.

    Its parameters are shards, parts of tensors or whole tensors, as its groups declare (see
    :class:`ds_zero.kinds.UpdateKind`). Costs three passes over memory where a fused kernel needs one. Yields the index
    of every unit at the end, since ``optimizer.step()`` does not say what it has finished.
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
