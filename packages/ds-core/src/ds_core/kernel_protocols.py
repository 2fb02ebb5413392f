"""The roles of kernels; see [Note: Roles] in ``protocols``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class ShardKernels(Protocol):
    """The two kernels a partitioner profits from."""

    def tree_sum(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        """Sum same-length 1D ``pieces`` in float32 along a binary tree over their order, into ``out``."""

    def chunk_sumsq(self, x: Tensor, chunk: int) -> Tensor:
        """Float64 sums of squares of the ``len(x) / chunk`` consecutive chunks of 1D ``x``."""


class KernelBackend(Protocol):
    """One implementation of some or all kernels."""

    @property
    def name(self) -> str:
        """As in the entry point."""

    def unusable(self) -> str | None:
        """Why this backend cannot run here, in one line; None when it can."""

    def find(self, op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op`` for tensors of one kind; None where there is none.

        Args:
            op: Name of an op: ``adamw``, ``tree_sum``, ``chunk_sumsq``, or one of those that ds-kernels declares.
            device: Where the tensors are.
            dtype: Data type of the op's first tensor.

        Returns:
            A function with the arguments and the meaning of the reference backend's. That of ``tree_sum`` and of
            ``chunk_sumsq`` for float32 takes bfloat16 and float16, too.
        """


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

    @property
    def zero_grad(self) -> bool:
        """Set the gradient to 0 in the same pass."""
