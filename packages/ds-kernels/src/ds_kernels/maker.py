"""Fused optimizers but Adam over a partitioner's shards: scale, step and copy in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from .fused import FusedOptimizer, GroupStep, Kernels

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import ParamGroups, ShardUpdate


class FusedMaker:
    """Makes a fused optimizer over 1D shards, and runs its step.

    Args:
        kind: The class.
        settings: What it is constructed with; a group's own settings win.
        kernels: The backend to run on; None takes the process's choice at each step.
    """

    def __init__(
        self, kind: Callable[..., FusedOptimizer], settings: Mapping[str, Any], *, kernels: KernelBackend | None = None
    ) -> None:
        self._kind = kind
        self._settings = settings
        self._kernels = kernels

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return an optimizer over ``groups``, whose parameters are 1D shards in float32.

        Raises:
            ValueError: If a group's own setting is out of its bounds.
        """
        return self._kind(groups, **self._settings, kernels=self._kernels)

    @torch.no_grad()
    def update(
        self, optimizer: torch.optim.Optimizer, units: Sequence[Sequence[ShardUpdate]], scale: float
    ) -> Iterator[int]:
        """Step once over all ``units``; a generator, so the step goes on as far as its indices are taken.

        One pass over memory: AdamW moves 28 bytes per element in float32; with bfloat16 gradients and copies also 28,
        where casting, stepping and copying back would move 40.

        Args:
            optimizer: What :meth:`make` returned.
            units: Shards to step, in units that are wanted together.
            scale: Factor on the gradients.

        Yields:
            The index of each unit when its parameters and copies stand.

        Raises:
            ValueError: If a shard's master is not a parameter of ``optimizer``, or its tensors do not fit.
        """
        mine = cast("FusedOptimizer", optimizer)
        step_of = {}
        kernels = Kernels(self._kernels)
        for group in mine.param_groups:
            group_step = GroupStep(mine, group, scale=scale, kernels=kernels)
            step_of.update(dict.fromkeys(group["params"], group_step))
        name = f"{type(self).__name__}.update"
        for index, unit in enumerate(units):
            with torch.profiler.record_function(name):
                for shard in unit:
                    if shard.master not in step_of:
                        raise ValueError(
                            "the master of each shard must be a parameter of the optimizer; got one of "
                            f"{shard.master.numel()} elements in unit {index} that is not; make the "
                            "optimizer over the same shards"
                        )
                    step_of[shard.master].run(shard.master, shard.grad, shard.copy)
            yield index
