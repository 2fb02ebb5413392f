"""The roles of kernels; see [Note: Roles] in ``protocols``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ShardKernels(Protocol):
    """The two kernels a partitioner profits from."""

    def tree_sum(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        """Sum same-length 1D ``pieces`` in float32 along a binary tree over their order, into ``out``."""

    def chunk_sumsq(self, x: Tensor, chunk: int) -> Tensor:
        """Float64 sums of squares of the ``len(x) / chunk`` consecutive chunks of 1D ``x``."""


class KernelBackend(ShardKernels, Protocol):
    """One implementation of all kernels."""

    @property
    def name(self) -> str:
        """As in the entry point."""

    def unusable(self) -> str | None:
        """Why this backend cannot run here, in one line; None when it can."""

    def adamw(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        copy: Tensor | None,
        hyper: AdamHyper,
    ) -> None:
        """One Adam or AdamW step, in place, in one pass over memory."""


class AdamHyper(Protocol):
    """Numbers of one Adam step."""

    @property
    def step(self) -> int:
        """Index of this step, from 1."""

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def beta1(self) -> float:
        """Decay of the first moment."""

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""

    @property
    def eps(self) -> float:
        """Added to the root of the second moment."""

    @property
    def weight_decay(self) -> float:
        """Weight decay."""

    @property
    def decoupled(self) -> bool:
        """True: AdamW's decay of the parameter; False: Adam's, added to the gradient."""

    @property
    def scale(self) -> float:
        """Factor on the gradient: mean, loss scale and clipping in one number."""
