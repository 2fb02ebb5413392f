"""Sum of a growing number of equal-length tensors along a fixed binary tree.

[Note: Summation tree]
Floating-point addition is not associative, so "the same bits on any number of ranks" needs one fixed order. Leaves
are the gradients of the global micro-batches 0, 1, 2, ...; the tree adds neighbours first: ((0+1)+(2+3))+... In
accumulation step i, rank r of N computes micro-batch ``i * N + r``. The ranks' gradients of one step are therefore N
neighbouring leaves, which the reduction adds along the lower levels of the tree; :class:`TreeSum` adds the steps
along the upper levels, like a binary counter: partial sums of 1, 2, 4, ... steps, at most one of each. For every N
that is a power of two this is one and the same tree. Partial sums are shards, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    def _keep(self, buffer: Tensor) -> None:
        self._free.append(buffer)
        # home on top: the next leaf is then summed where this rank's part of it already lies
        self._free.sort(key=lambda free: free is self._home)
