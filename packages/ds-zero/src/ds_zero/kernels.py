"""Plain torch forms of the kernels a partitioner calls; faster ones are passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .layout import LEAF

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

_SLICE = 1 << 16  # elements squared at a time


class TorchKernels:
    """Kernels from torch operations, for any device."""

    def __init__(self) -> None:
        self._squares = torch.empty(0, dtype=torch.float64)  # 1D, kept from call to call

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
        if self._squares.numel() < min(_SLICE, x.numel()) or self._squares.device != x.device:
            self._squares = torch.empty(min(_SLICE, x.numel()), dtype=torch.float64, device=x.device)
        sums = torch.empty(x.numel() // LEAF, dtype=torch.float64, device=x.device)
        for part, out in zip(x.split(_SLICE), sums.split(_SLICE // LEAF), strict=True):
            squares = self._squares[: part.numel()].copy_(part).square_()
            torch.sum(squares.view(-1, LEAF), dim=1, out=out)
        while sums.numel() * chunk > x.numel():
            sums = sums[::2] + sums[1::2]
        return sums


class FoundKernels(NamedTuple):
    """Those that a backend has, and plain torch where it has none."""

    tree_sum: Callable[[Tensor, Sequence[Tensor]], None]
    chunk_sumsq: Callable[[Tensor, int], Tensor]


def kernels_of(backend: KernelBackend, device: torch.device) -> FoundKernels:
    """Return what ``backend`` offers a partitioner on ``device``."""
    plain = TorchKernels()
    return FoundKernels(
        backend.find("tree_sum", device, torch.float32) or plain.tree_sum,
        backend.find("chunk_sumsq", device, torch.float32) or plain.chunk_sumsq,
    )
