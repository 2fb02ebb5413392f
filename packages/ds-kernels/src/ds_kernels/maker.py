"""Fused optimizers but Adam over a partitioner's shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .adamw import ShardMaker
from .fused import FusedOptimizer
from .group_step import GroupStep, Kernels

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import ParamGroups


class FusedMaker(ShardMaker):
    """Makes a fused optimizer over 1D shards, and runs its step.

    Args:
        kind: The class.
        settings: What it is constructed with; a group's own settings win.
        kernels: The backend to run on; None takes the process's choice at each step.
    """

    def __init__(
        self, kind: Callable[..., FusedOptimizer], settings: Mapping[str, Any], *, kernels: KernelBackend | None = None
    ) -> None:
        super().__init__(GroupStep, Kernels, kernels)
        self._kind = kind
        self._settings = settings
        self._kernels = kernels

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return an optimizer over ``groups``, whose parameters are 1D shards in float32.

        Raises:
            ValueError: If a group's own setting is out of its bounds.
        """
        return self._kind(groups, **self._settings, kernels=self._kernels)
