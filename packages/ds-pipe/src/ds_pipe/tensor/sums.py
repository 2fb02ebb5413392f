"""Sums over blocks along one fixed tree, wherever the blocks are.

[Note: Tree over blocks]
A layer is split into V *blocks*, V a power of two that the configuration fixes, and T ranks, a power of two up to V,
have V / T neighbouring blocks each. Floating-point addition is not associative, so whatever is summed over blocks is
summed along one binary tree: neighbours first, ((0 + 1) + (2 + 3)) + ... A rank's blocks are a subtree, which it sums
by itself; the ranks' sums are then added along the rest of the tree, in the order of the ranks, on every rank. So a
sum has the same bits on 1, 2, ..., V ranks, and on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FEW = 2
"""Ranks for which one gather sends no more than a reduction and a gather would."""


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """Add a power of two of tensors, neighbours first; one alone is returned as it is.

    Example:
        >>> tree_sum([torch.tensor([float(value)]) for value in (1, 2, 3, 4)])
        tensor([10.])
    """
    while len(terms) > 1:
        terms = [first + second for first, second in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


class Ranks:
    """The ranks that have the blocks of one model; what they tell each other.

    Args:
        group: They; None: this process alone.

    Raises:
        ValueError: Their number is no power of two.

    Example:
        >>> Ranks().sum(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.size & (self.size - 1):
            raise ValueError(f"tensor parallelism takes a power of two of ranks (1, 2, 4, ...); got {self.size}")

    def __deepcopy__(self, memo: Any) -> Ranks:
        """Return it itself: a copy of a model is on the same ranks."""
        return self

    def sum(self, own: Tensor) -> Tensor:
        """Add the tensors of all ranks along the tree; see [Note: Tree over blocks].

        Sends, per rank, n elements on 2 ranks, and 2 n (T - 1) / T on more.
        """
        if self.size == 1:
            return own
        if self.size <= _FEW or own.numel() < self.size:
            return tree_sum(self.gather(own))
        width = -(-own.numel() // self.size)
        flat = own.new_zeros(self.size * width)
        flat[: own.numel()] = own.reshape(-1)
        rows = torch.empty_like(flat)
        dist.all_to_all_single(rows, flat, group=self._group)
        part = tree_sum(rows.chunk(self.size)).contiguous()
        dist.all_gather([*flat.chunk(self.size)], part, group=self._group)
        return flat[: own.numel()].view(own.shape)

    def gather(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which have one shape, in the order of the ranks."""
        if self.size == 1:
            return [own]
        own = own.contiguous()
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self._group)
        return rows

    def take(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with that of the first rank."""
        if self.size > 1:
            whole = tensor.contiguous()
            dist.broadcast(whole, group=self._group, group_src=0)
            tensor.copy_(whole)
