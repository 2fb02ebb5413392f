"""What a partitioner and an optimizer that exchanges messages itself are to each other.

[Note: Own gradients]
Such an optimizer has ``exchanges: True`` in its parameter groups. First it is stepped like any other, on shards and
mean gradients. From the step on at which it says so, ranks do not add their gradients: each has its *own* one, whole,
and the optimizer updates the whole weights by it and by what it exchanges, to the same bits on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .protocols import Collectives


class Part(Protocol):
    """An interval of a buffer that one parameter of the optimizer stands for."""

    @property
    def group(self) -> int:
        """Index of the parameter group."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def end(self) -> int:
        """First element behind it."""

    @property
    def name(self) -> str:
        """Fully qualified name of the tensor; of several, of the first."""


class WholeFlat(Protocol):
    """A buffer of parameters that communicate together, whole on every rank, and this rank's shard of it."""

    @property
    def key(self) -> int:
        """Names the buffer in communication, the same on every rank."""

    @property
    def numel(self) -> int:
        """Elements of the buffer; a shard is a rank's equal part of it."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    def parts(self) -> Sequence[Part]:
        """What the optimizer would have as parameters if nothing were cut."""

    @property
    def gaps(self) -> Sequence[tuple[int, int]]:
        """Intervals that belong to no parameter."""

    @property
    def shards(self) -> Sequence[tuple[int, nn.Parameter]]:
        """The optimizer's parameters on this rank, each with its first element in the buffer."""

    def gradient(self) -> Tensor:
        """Return this rank's own gradient, the sum over its micro-batches: 1D; may be overwritten."""

    def weights(self) -> Tensor:
        """Return the exact weights: 1D, float32. They may be changed until :meth:`put_back`."""

    def put_back(self) -> None:
        """Take over the weights of the last :meth:`weights`, which are the same on all ranks."""


class ExchangingOptimizer(Protocol):
    """What an optimizer offers that exchanges messages itself; see [Note: Own gradients]."""

    def join(self, comm: Collectives, flats: Sequence[WholeFlat]) -> None:
        """Exchange messages over ``comm`` from now on; called once, before the first step."""

    @property
    def wants_own(self) -> bool:
        """Whether the next step is :meth:`step_own`, not ``step``."""

    def step_own(self, scale: float) -> None:
        """Step once with each rank's own gradient times ``scale``. All ranks call it; gradients are finite."""

    def forget_whole(self) -> None:
        """Derive anew what was derived from shards of the state: they were written from outside."""

    def owed(self) -> Mapping[int, Tensor]:
        """Return by key this rank's shard (1D, float32) of what all ranks have yet to send. All ranks call it."""

    def load_owed(self, owed: Mapping[int, Tensor]) -> None:
        """Have yet to send what :meth:`owed` gave, on any number of ranks, and nothing else."""

    @property
    def whole_bytes(self) -> int:
        """Bytes held besides the tensors of ``state``."""
