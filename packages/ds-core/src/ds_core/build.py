"""The composition root: from a model and a configuration to an engine.

Everything is chosen here, once, in the order in which it depends on each other, and handed down as an argument;
nobody below asks the configuration anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from . import config as configuration
from . import registry
from ._control import make_control, together
from .agreement import check_agreed
from .axes import data_axis, make_axes
from .collaborators import ClientOptimizer, ClientSchedule, Given, make_context, outfit, shard_whole
from .data import TrainLoader
from .engine import Engine
from .pipeline_engine import PipelineEngine
from .process_group import join_group, local_device, message_device
from .protocols import LearningRateSchedule, ParamGroups
from .splitting import make_splitting
from .staging import num_pipeline_ranks, shard_stages

if TYPE_CHECKING:
    from .config import Source
    from .pipeline_protocols import StagedModel
    from .protocols import Sharded


class Training(NamedTuple):
    """What :func:`initialize` returns."""

    engine: Engine
    optimizer: torch.optim.Optimizer | None  # over the shards; read and set its param_groups
    dataloader: TrainLoader | None  # this rank's micro-batches, if training_data was given
    lr_scheduler: LearningRateSchedule | None


def initialize(
    model: nn.Module | StagedModel,
    optimizer: ClientOptimizer = None,
    *,
    config: Source,
    model_parameters: Iterable[Any] | Callable[[nn.Module], ParamGroups] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: ClientSchedule = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Training:
    """Make an engine that trains ``model`` as ``config`` says.

    Args:
        model: Built the same way on every rank; rank 0's values are taken. It is moved to this process's device and
            partitioned in place. One that is too large for that is built under ``ds_zero.deferred()``. Or a
            ``ds_pipe.PipelineModule``: each rank builds its own stages, and the engine is a :class:`PipelineEngine`.
        optimizer: An optimizer over the model's parameters, or a function that makes one from parameter groups; it
            wins over the configuration's. A function where the model is in stages.
        config: A DeepSpeed configuration: a dictionary, a path to a JSON file, or JSON text.
        model_parameters: What to train, as for ``torch.optim``; None: all parameters that require a gradient. Where the
            model is in stages, a function that takes a stage and returns parameter groups, as many for each.
        training_data: Map-style dataset to be dealt to the ranks.
        lr_scheduler: A schedule over ``optimizer``, or a function that makes one from an optimizer; it wins over the
            configuration's. The engine steps it.
        collate_fn: Makes a batch of a list of samples.
        group: The ranks; None: all of them. A process launched by ``ds run`` or ``torchrun`` joins the others.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``.

    Raises:
        ValueError: The configuration is wrong or contradicts the arguments; a plugin is missing.
        RankError: So it is on other ranks only.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> engine, *_ = initialize(
        ...     model, config={"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
        ... )
        >>> loss = engine(torch.ones(4, 2)).square().mean()
        >>> _ = engine.backward(loss)
        >>> engine.step().boundary
        True
    """
    group = group if group is not None else join_group()
    device = local_device(group, model if isinstance(model, nn.Module) else nn.Identity())
    control = make_control(group, message_device(group, device))
    with together(control, own_type=True):
        source = configuration.read(config)
    check_agreed(source, control)
    given = Given(optimizer, model_parameters, training_data, lr_scheduler, collate_fn)
    num_tensor_ranks = configuration.num_tensor_ranks(source)
    if isinstance(model, nn.Module):
        alone = num_tensor_ranks == 1
        axes = data_axis(group) if alone else make_axes(group, 1, device.type, num_tensor_ranks)
    else:
        num_pipe_ranks = num_pipeline_ranks(model, source, group, num_tensor_ranks)
        axes = make_axes(group, num_pipe_ranks, device.type, num_tensor_ranks)
    with together(control, own_type=True):  # a plugin may be missing on one of them
        settings = configuration.parse(
            source, axes.num_data_ranks, registry.load, client_optimizer=optimizer is not None
        )
    if axes.data_rank == axes.pipe_rank == axes.tensor_rank == 0:
        configuration.announce(settings)
    context = make_context(settings, axes.data, device)
    splitting = make_splitting(settings, context, axes)
    make: Callable[..., Engine]
    sharded: Sharded
    if isinstance(model, nn.Module):
        make, sharded = Engine, shard_whole(model, given, settings, context, splitting)
    else:
        sharded, running = shard_stages(
            model, given, settings, context, axes=axes, control=control, splitting=splitting
        )
        make = partial(PipelineEngine, running=running)
    fit = outfit(sharded, given, settings, axes=axes, device=device, control=control)
    engine = make(
        sharded,
        fit.policy,
        scale=fit.scale,
        vault=fit.vault,
        lr_scheduler=fit.lr_scheduler,
        training_dataloader=fit.training_dataloader,
    )
    return Training(engine, sharded.optimizer, fit.training_dataloader, fit.lr_scheduler)
