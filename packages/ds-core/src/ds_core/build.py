"""The composition root: from a model and a configuration to an engine.

Everything is chosen here, once, in the order in which it depends on each other, and handed down as an argument;
nobody below asks the configuration anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from . import config as configuration
from . import loss_scale, registry
from ._control import make_control
from ._log import logger
from .activations import Checkpointer
from .data import Dealing, TrainLoader
from .engine import Engine
from .kernel_protocols import KernelBackend
from .optimizers import ClientMaker
from .policy import StepPolicy
from .process_group import join_group, local_device, message_device
from .protocols import BuildContext, Compression, LearningRateSchedule, OptimizerMaker, ParamGroups, Partitioner
from .saving import Vault
from .schedules import Scheduler

if TYPE_CHECKING:
    from .config import Config, Source

ClientOptimizer: TypeAlias = "torch.optim.Optimizer | Callable[[ParamGroups], torch.optim.Optimizer] | None"
ClientSchedule: TypeAlias = "LearningRateSchedule | Callable[[torch.optim.Optimizer], LearningRateSchedule] | None"

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Training(NamedTuple):
    """What :func:`initialize` returns."""

    engine: Engine
    optimizer: torch.optim.Optimizer | None  # over the shards; read and set its param_groups
    dataloader: TrainLoader | None  # this rank's micro-batches, if training_data was given
    lr_scheduler: LearningRateSchedule | None


def initialize(
    model: nn.Module,
    optimizer: ClientOptimizer = None,
    *,
    config: Source,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: ClientSchedule = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Training:
    """Make an engine that trains ``model`` as ``config`` says.

    Args:
        model: Built the same way on every rank; rank 0's values are taken. It is moved to this process's device and
            partitioned in place. One that is too large for that is built under ``ds_zero.deferred()``.
        optimizer: An optimizer over the model's parameters, or a function that makes one from parameter groups; it
            wins over the configuration's.
        config: A DeepSpeed configuration: a dictionary, a path to a JSON file, or JSON text.
        model_parameters: What to train, as for ``torch.optim``; None: all parameters that require a gradient.
        training_data: Map-style dataset to be dealt to the ranks.
        lr_scheduler: A schedule over ``optimizer``, or a function that makes one from an optimizer; it wins over the
            configuration's. The engine steps it.
        collate_fn: Makes a batch of a list of samples.
        group: The ranks; None: all of them. A process launched by ``ds run`` or ``torchrun`` joins the others.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``.

    Raises:
        ValueError: The configuration is wrong or contradicts the arguments; a plugin is missing.

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
    num_ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    settings = configuration.parse(
        configuration.read(config), num_ranks, registry.load, client_optimizer=optimizer is not None
    )
    if rank == 0:
        configuration.announce(settings)
    context = _context(settings, group, local_device(group, model))
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model.to(context.device)  # what has no values yet is made there by the partitioner
    groups = _param_groups(model, optimizer, model_parameters)
    maker = _optimizer_maker(settings, optimizer, groups, context)
    sharded = _partitioner(settings, context).shard(model, maker, groups)
    if settings.activation_checkpointing.blocks:
        # no two ranks have the same activations, so there is nothing to partition
        kept = replace(settings.activation_checkpointing, partition_activations=False)
        sharded.wrap_blocks(Checkpointer(kept))
    schedule = _schedule(settings, lr_scheduler, sharded.optimizer)
    policy = _policy(settings, context, rank, num_ranks)
    loader = _loader(settings, policy, training_data, collate_fn)
    engine = Engine(
        sharded,
        policy,
        scale=loss_scale.init(settings.fp16),
        vault=Vault(make_control(group, message_device(group, context.device))),
        lr_scheduler=schedule,
        training_dataloader=loader,
    )
    return Training(engine, sharded.optimizer, loader, schedule)


# Collaborators, in the order in which they are built #


def _context(settings: Config, group: dist.ProcessGroup | None, device: torch.device) -> BuildContext:
    compute = torch.bfloat16 if settings.bf16.enabled else torch.float16 if settings.fp16.enabled else None
    bare = BuildContext(
        device=device,
        compute_dtype=compute,
        group=group,
        gradient_dtype=_DTYPES[settings.data_types.grad_accum_dtype],
        keep_fp32=settings.data_types.keep_in_fp32_modules,
    )
    with_kernels = replace(bare, kernels=_kernels(settings.kernels.backend, bare))
    return replace(
        with_kernels,
        compression=cast("Compression | None", _selected(settings, "collectives", with_kernels)),
    )


def _kernels(name: str, context: BuildContext) -> KernelBackend | None:
    """Return the named backend; ``auto`` is the one for the device, or ``reference`` where it cannot run.

    None, where no backend is installed for the device, is each plugin's own default.
    """
    if name != "auto":
        backend: KernelBackend = registry.load("ds.kernels", name).build(None, context)
        reason = backend.unusable()
        if reason is not None:
            raise ValueError(f"kernels.backend = {name!r} cannot be used: {reason}")
        return backend
    offered = {row.name for row in registry.installed("ds.kernels")}
    wanted = "cpu" if context.device.type == "cpu" else "cuda"
    if wanted not in offered:
        return None
    backend = registry.load("ds.kernels", wanted).build(None, context)
    reason = backend.unusable()
    if reason is None:
        return backend
    logger.warning("kernels: plain torch instead of the backend %r: %s", wanted, reason)
    # given, so that no plugin chooses for itself and says the same again
    return registry.load("ds.kernels", "reference").build(None, context) if "reference" in offered else None


def _param_groups(model: nn.Module, optimizer: ClientOptimizer, model_parameters: Iterable[Any] | None) -> ParamGroups:
    """Return what to train as ``torch.optim`` groups."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.param_groups
    if model_parameters is None:
        return [{"params": [param for param in model.parameters() if param.requires_grad]}]
    given = list(model_parameters)
    if given and isinstance(given[0], Mapping):
        return [dict(entry) for entry in given]
    return [{"params": given}]


def _optimizer_maker(
    settings: Config, optimizer: ClientOptimizer, groups: ParamGroups, context: BuildContext
) -> OptimizerMaker | None:
    if groups == [{"params": []}] and (optimizer is not None or settings.optimizer is not None):
        raise ValueError(
            "there is nothing to train: model_parameters is empty, or no parameter of the model requires a gradient; "
            "pass what to train, or no optimizer"
        )
    if optimizer is not None:
        return ClientMaker(optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(groups))
    if settings.optimizer is None:
        return None
    return cast("OptimizerMaker", settings.optimizer.plugin.build(settings.optimizer.config, context))


def _partitioner(settings: Config, context: BuildContext) -> Partitioner:
    selected = _selected(settings, "partitioner", context)
    if selected is None:
        plugin = registry.load("ds.partitioner", "zero")
        kind = plugin.config_type
        selected = plugin.build(None if kind is None else kind(), context)
    return cast("Partitioner", selected)


def _selected(settings: Config, role: str, context: BuildContext) -> object | None:
    choice = settings.plugins.get(role)
    return None if choice is None else choice.plugin.build(choice.config, context)


def _schedule(
    settings: Config, given: ClientSchedule, optimizer: torch.optim.Optimizer | None
) -> LearningRateSchedule | None:
    if given is not None and optimizer is None:
        raise ValueError("lr_scheduler was given, but there is no optimizer: pass one, or add the section 'optimizer'")
    if optimizer is None:
        return None
    if given is None:
        return None if settings.scheduler is None else Scheduler(optimizer, settings.scheduler)
    # every schedule of torch is an object with step(); what has none is a function that makes one
    schedule = given(optimizer) if callable(given) else given
    try:
        inspect.signature(schedule.step).bind()
    except TypeError as error:
        raise ValueError(
            f"the engine calls step() of the schedule without arguments, got a {type(schedule).__name__}: {error}; "
            "step that one yourself, over the optimizer that initialize() returns"
        ) from None
    return schedule


def _policy(settings: Config, context: BuildContext, rank: int, num_ranks: int) -> StepPolicy:
    precision = settings.bf16 if settings.bf16.enabled else settings.fp16
    return StepPolicy(
        train_batch_size=settings.train_batch_size,
        micro_batch_size=settings.train_micro_batch_size_per_gpu,
        accumulation=settings.gradient_accumulation_steps,
        rank=rank,
        num_ranks=num_ranks,
        clip=settings.gradient_clipping,
        skip_not_finite=settings.bf16.check_grad_overflow or not settings.bf16.enabled,
        cast_inputs=context.compute_dtype if precision.auto_cast else None,
        seed=settings.seed,
        device=context.device,
    )


def _loader(
    settings: Config, policy: StepPolicy, dataset: Dataset[Any] | None, collate_fn: Callable[[list[Any]], Any] | None
) -> TrainLoader | None:
    if dataset is None:
        return None
    dealing = Dealing(
        rank=policy.rank,
        num_ranks=policy.num_ranks,
        micro_size=policy.micro_batch_size,
        step_size=policy.train_batch_size,
        seed=settings.seed,
        drop_last=settings.dataloader_drop_last,
    )
    return TrainLoader(dataset, dealing, collate_fn, device=policy.device)
