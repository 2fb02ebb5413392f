"""Splitting a model over tensor-parallel ranks, before it is partitioned over the data-parallel ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn

from ._control import everybody, make_control, together
from .process_group import message_device
from .protocols import OptimizerMaker, ParamGroups, Partitioner, Sharded
from .split_model import Ranks, SplitSharded

if TYPE_CHECKING:
    from .axes import Axes
    from .collaborators import Given
    from .config import Config
    from .protocols import BuildContext
    from .tensor_protocols import PlannedSplit, SplitModel, Splitter

Shard: TypeAlias = "Callable[[Partitioner, OptimizerMaker | None, ParamGroups], Sharded]"


class Prepared(NamedTuple):
    """A model that can be partitioned."""

    given: Given  # of the caller, with the parameters that there are now
    shard: Shard  # partitions it


class Splitting(Protocol):
    """What is done to layers before a model is partitioned."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks with the same activations between layers; None: there are none."""

    def prepare(self, modules: Sequence[nn.Module], given: Given, *, keep: Collection[str] = ()) -> list[Prepared]:
        """Return what partitions each of the modules, this rank's part of a model; all ranks call it."""


class WholeLayers:
    """Leaves models as they are: each rank has whole layers."""

    group: dist.ProcessGroup | None = None

    def prepare(self, modules: Sequence[nn.Module], given: Given, *, keep: Collection[str] = ()) -> list[Prepared]:
        """Return what partitions each of the modules."""
        del keep
        return [Prepared(given, _plain(module)) for module in modules]


class SplitLayers:
    """Splits models.

    Args:
        splitter: Does it.
        axes: Who this rank splits layers, shares data and has a pipeline with.
        device: Where messages live.
    """

    def __init__(self, splitter: Splitter, axes: Axes, device: torch.device) -> None:
        self.group = axes.tensor
        self._splitter = splitter
        self._pipe = make_control(axes.pipe, message_device(axes.pipe, device))
        self._ranks = Ranks(
            make_control(axes.tensor, message_device(axes.tensor, device)),
            make_control(axes.data, message_device(axes.data, device)),
            axes.tensor,
            message_device(axes.tensor, device),
        )

    def prepare(self, modules: Sequence[nn.Module], given: Given, *, keep: Collection[str] = ()) -> list[Prepared]:
        """Split each of the modules, which are this rank's part of a model; all ranks call it.

        Args:
            modules: They.
            given: Of the caller; an optimizer that is there already gets the parameters that there are now.
            keep: Names of parameters that several stages have in common.

        Raises:
            ValueError: A layer cannot be split, or a pattern matches nothing on any rank of the pipeline; nothing is
                changed then.
        """
        with together(self._pipe):
            plans = [self._splitter.plan(module, keep=keep) for module in modules]
        self._check_matches(plans)
        made = [plan.split() for plan in plans]
        for each in made:
            given = _renewed(given, each)
        return [Prepared(given, self._sharding(module, each)) for module, each in zip(modules, made, strict=True)]

    def _check_matches(self, plans: Sequence[PlannedSplit]) -> None:
        """Refuse patterns that match nothing in any stage of the pipeline."""
        rows = everybody(self._pipe, [[[*plan.unmatched], [*plan.layers]] for plan in plans])
        stages = [stage for row in rows for stage in row]
        missed = [
            pattern for pattern in dict.fromkeys(stages[0][0]) if all(pattern in missed for missed, _ in stages[1:])
        ]
        if missed:
            layers = [name for _, names in stages for name in names]
            raise ValueError(f"tensor_parallel: {self._splitter.no_match(missed, layers)}")

    def _sharding(self, module: nn.Module, made: SplitModel) -> Shard:
        def shard(partitioner: Partitioner, maker: OptimizerMaker | None, groups: ParamGroups) -> Sharded:
            inner = partitioner.shard(module, maker, groups, separate=made.blocks)
            return SplitSharded(inner, made, self._ranks)

        return shard


def make_splitting(settings: Config, context: BuildContext, axes: Axes) -> Splitting:
    """Return what the configuration says of layers."""
    choice = settings.plugins.get("tensor_parallel")
    if choice is None:
        return WholeLayers()
    splitter = cast("Splitter", choice.plugin.build(choice.config, replace(context, group=axes.tensor)))
    return SplitLayers(splitter, axes, context.device)


def _plain(module: nn.Module) -> Shard:
    return lambda partitioner, maker, groups: partitioner.shard(module, maker, groups)


def _renewed(given: Given, made: SplitModel) -> Given:
    """Return what the caller has given with blocks in place of what was split."""
    if isinstance(given.optimizer, torch.optim.Optimizer):
        for group in given.optimizer.param_groups:
            group["params"] = made.renewed(group["params"])
        return given
    if given.model_parameters is None or callable(given.model_parameters):
        return given
    listed: list[Any] = list(given.model_parameters)
    if listed and isinstance(listed[0], Mapping):
        entries = [{**entry, "params": made.renewed(_listed(entry["params"]))} for entry in listed]
        return given._replace(model_parameters=entries)
    return given._replace(model_parameters=made.renewed(listed))


def _listed(params: Any) -> list[nn.Parameter]:
    return [params] if isinstance(params, nn.Parameter) else list(params)
