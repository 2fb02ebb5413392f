"""A model in stages: which ranks have which, each stage partitioned, and the pipeline over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ._control import make_control, together
from .chunks import Chunks
from .collaborators import Given, make_partitioner, make_pipelines, optimizer_maker, param_groups, recompute_blocks
from .pipeline_engine import Running
from .process_group import message_device

if TYPE_CHECKING:
    from ._control import Control
    from .axes import Axes
    from .config import Config
    from .pipeline_protocols import StagedModel
    from .protocols import BuildContext, Json, Sharded
    from .splitting import Splitting


def num_pipeline_ranks(
    model: StagedModel, source: Mapping[str, Json], group: dist.ProcessGroup | None, num_tensor_ranks: int
) -> int:
    """Return over how many ranks a model is cut: as it says, or the configuration; else over all there are.

    Raises:
        ValueError: Both say so, and differ; or that is no number.
    """
    section = source.get("pipeline")
    configured = section.get("stages") if isinstance(section, Mapping) else None
    configured = None if configured == "auto" else configured
    said = [number for number in (model.num_stages, configured) if number is not None]
    if len(set(said)) > 1:
        raise ValueError(f"the model has num_stages={said[0]}, the configuration pipeline.stages = {said[1]}; keep one")
    number = said[0] if said else 1 if group is None else max(1, dist.get_world_size(group) // num_tensor_ranks)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"pipeline.stages must be a positive number of ranks; got {number!r}")
    return number


class StageVerbs:
    """Plays the role ``StageParameters``.

    Args:
        chunks: The stages of this rank, partitioned.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def unshard(self, stage: int) -> None:
        """Make the parameters of a stage whole."""
        self._chunks.unshard(self._chunks.module[str(stage)])

    def reshard(self, stage: int) -> None:
        """Give back what :meth:`unshard` made whole."""
        self._chunks.reshard(self._chunks.module[str(stage)])

    def reduce(self, stage: int) -> None:
        """Send nothing: each micro-batch is reduced as its backward pass ends, in the order of the one sum."""
        del stage
        self._chunks.has_run = True


def shard_stages(
    model: StagedModel,
    given: Given,
    settings: Config,
    context: BuildContext,
    *,
    axes: Axes,
    control: Control,
    splitting: Splitting,
) -> tuple[Chunks, Running]:
    """Build and partition this rank's stages of ``model``, and connect them with the other ranks'.

    Args:
        model: The description.
        given: Of the caller.
        settings: The configuration.
        context: For plugins; its group is that of the data-parallel ranks.
        axes: This rank's place.
        control: All ranks.
        splitting: What is done to layers before.

    Raises:
        ValueError: The optimizer, or what is to be trained, is given as something else than a function.
    """
    if isinstance(given.optimizer, torch.optim.Optimizer):
        raise ValueError(
            "the parameters of a model in stages are made in initialize(): pass a function that makes the optimizer "
            f"from parameter groups, got a {type(given.optimizer).__name__}"
        )
    if given.model_parameters is not None and not callable(given.model_parameters):
        raise ValueError(
            "the parameters of a model in stages are made in initialize(): leave model_parameters out to train all "
            "that require a gradient, or pass a function that takes a stage and returns parameter groups"
        )
    with together(control):
        stages = make_pipelines(settings, context).cut(
            model,
            rank=axes.pipe_rank,
            num_ranks=axes.num_pipe_ranks,
            num_micro_batches=settings.gradient_accumulation_steps,
        )
    partitioner = make_partitioner(settings, replace(context, partial=True))
    sharded: dict[int, Sharded] = {}
    for module in stages.modules.values():
        module.to(context.device)
    prepared = splitting.prepare([*stages.modules.values()], given, keep=stages.shared)
    for (stage, module), (_, shard) in zip(stages.modules.items(), prepared, strict=True):
        groups = param_groups(module, given)
        trains = any(len(entry["params"]) for entry in groups)
        maker = optimizer_maker(settings, given.optimizer, groups, context) if trains else None
        sharded[stage] = shard(partitioner, maker, groups if trains else [])
    pipe_control = make_control(axes.pipe, message_device(axes.pipe, context.device))
    chunks = Chunks(sharded, pipe_control, axes, num_micro_batches=settings.gradient_accumulation_steps)
    recompute_blocks(chunks, settings, splitting.group)
    pipeline = stages.connect(axes.pipe, StageVerbs(chunks), seed=settings.seed)
    running = Running(pipeline, axes, control, has_first=stages.has_first, has_last=stages.has_last)
    return chunks, running
