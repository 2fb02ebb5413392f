"""The roles by which users reach a partitioned model's values; see [Note: Roles] in ``protocols``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from torch import Tensor, nn

Param: TypeAlias = "str | nn.Parameter"
"""A parameter, or its name in the model."""


# Single tensors. All ranks call what is full, and what writes #


class Interval(Protocol):
    """What this rank holds of a tensor."""

    @property
    def start(self) -> int:
        """First element, in the row-major flattened tensor."""

    @property
    def data(self) -> Tensor:
        """The elements from ``start`` on, 1D: a view of live memory; empty if it holds nothing."""


class ParamAccess(Protocol):
    """Parameters: exact, which is in float32 where they are trained in mixed precision."""

    def full_param(self, param: Param) -> Tensor:
        """Return a copy of the whole parameter."""

    def set_full_param(self, param: Param, value: Tensor) -> None:
        """Replace the whole parameter by ``value``, which is the same on all ranks."""

    def local_param(self, param: Param) -> Interval:
        """Return this rank's interval, to be read."""

    def set_local_param(self, param: Param, value: Tensor) -> None:
        """Replace this rank's interval."""

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter, whole, with its name; all ranks go through all of it."""

    def gathered(
        self, what: nn.Module | Param | Iterable[Param], *, writeback_from: int | None = None
    ) -> AbstractContextManager[None]:
        """Make parameters whole in the model within the block; changes of one rank become everybody's."""


class GradAccess(Protocol):
    """Gradients since the last step, over all ranks and micro-batches; times the loss scale, where there is one."""

    def full_grad(self, param: Param, *, reduction: str = "mean") -> Tensor:
        """Return a copy of the whole gradient in float32: the ``"mean"`` or the ``"sum"``."""

    def set_full_grad(self, param: Param, value: Tensor, *, reduction: str = "mean") -> None:
        """Replace the whole gradient by ``value``, which is the same on all ranks."""

    def local_grad(self, param: Param) -> Interval:
        """Return this rank's interval of the sum, to be read."""

    def set_local_grad(self, param: Param, value: Tensor) -> None:
        """Replace this rank's interval of the sum."""


class OptimizerStateAccess(Protocol):
    """Tensors that the optimizer keeps beside parameters; ``key`` is the optimizer's name of it, as ``"exp_avg"``."""

    def full_state(self, param: Param, key: str) -> Tensor:
        """Return a copy of the whole tensor in float32."""

    def set_full_state(self, param: Param, key: str, value: Tensor) -> None:
        """Replace the whole tensor by ``value``, which is the same on all ranks."""

    def local_state(self, param: Param, key: str) -> Interval:
        """Return this rank's interval, to be read."""


class Access(ParamAccess, GradAccess, OptimizerStateAccess, Protocol):
    """Parameters, gradients and optimizer state, one tensor at a time, at every stage."""


# All state, and all weights #


class Parking(Protocol):
    """Moves state to host memory and back."""

    @property
    def kinds(self) -> Sequence[str]:
        """What can be moved: ``params``, ``masters``, ``optimizer``, ``gradients``."""

    def offload_states(self, include: Iterable[str], *, pin_memory: bool = True) -> dict[str, int]:
        """Move ``include`` of :attr:`kinds`; return the bytes that each has freed. Until it is back nothing may run."""

    def reload_states(self) -> int:
        """Move back all that is away; return the bytes."""


class Weights(Protocol):
    """Parameters and buffers as the model computes with them; parameters that need no gradient if ``frozen``."""

    def save(self, folder: str | os.PathLike[str], *, name: str, frozen: bool = True) -> Mapping[str, int]:
        """Write them into one safetensors file, one tensor after the other; all ranks call it, rank 0 writes.

        Returns on all ranks the bytes of each tensor in the file, by name.
        """

    def state_dict(self, *, frozen: bool = True) -> Mapping[str, Tensor]:
        """Return them in host memory on rank 0, under all names of the model; nothing elsewhere. All ranks call it."""
