"""What an engine is made of, each part from the configuration and from those before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from . import loss_scale, registry
from ._log import logger
from .activations import Checkpointer
from .data import Dealing, TrainLoader
from .kernel_protocols import KernelBackend
from .optimizers import ClientMaker
from .policy import StepPolicy
from .protocols import BuildContext, Compression, LearningRateSchedule, OptimizerMaker, ParamGroups, Partitioner
from .saving import Vault
from .schedules import Scheduler

if TYPE_CHECKING:
    from ._control import Control
    from .axes import Axes
    from .config import Config
    from .loss_scale import LossScale
    from .pipeline_protocols import PipelineBuilder
    from .protocols import Sharded
    from .splitting import Splitting

ClientOptimizer: TypeAlias = "torch.optim.Optimizer | Callable[[ParamGroups], torch.optim.Optimizer] | None"
ClientSchedule: TypeAlias = "LearningRateSchedule | Callable[[torch.optim.Optimizer], LearningRateSchedule] | None"

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Given(NamedTuple):
    """What the caller of ``initialize`` has passed beside model and configuration."""

    optimizer: ClientOptimizer = None
    model_parameters: Iterable[Any] | Callable[[nn.Module], ParamGroups] | None = None
    training_data: Dataset[Any] | None = None
    lr_scheduler: ClientSchedule = None
    collate_fn: Callable[[list[Any]], Any] | None = None


class Outfit(NamedTuple):
    """What an engine has beside the partitioned model."""

    policy: StepPolicy
    scale: LossScale
    vault: Vault
    lr_scheduler: LearningRateSchedule | None
    training_dataloader: TrainLoader | None


def outfit(
    sharded: Sharded, given: Given, settings: Config, *, axes: Axes, device: torch.device, control: Control
) -> Outfit:
    """Return the rest of an engine."""
    policy = _policy(settings, device, axes.data_rank, axes.num_data_ranks)
    return Outfit(
        policy,
        loss_scale.init(settings.fp16),
        Vault(control),
        _schedule(settings, given.lr_scheduler, sharded.optimizer),
        _loader(settings, policy, given.training_data, given.collate_fn),
    )


def shard_whole(
    model: nn.Module, given: Given, settings: Config, context: BuildContext, splitting: Splitting
) -> Sharded:
    """Partition a model over all ranks."""
    if "pipeline" in settings.plugins:
        raise ValueError(
            f"pipeline = {dict(settings.plugins['pipeline'].params)!r} cuts a ds_pipe.PipelineModule into stages, got "
            f"a {type(model).__name__}: make one of its layers (PipelineModule, PipelineModule.from_sequential), or "
            "remove the section"
        )
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model.to(context.device)  # what has no values yet is made there by the partitioner
    ((given, shard),) = splitting.prepare([model], given)
    groups = param_groups(model, given)
    maker = optimizer_maker(settings, given.optimizer, groups, context)
    sharded = shard(make_partitioner(settings, context), maker, groups)
    recompute_blocks(sharded, settings, splitting.group)
    return sharded


def recompute_blocks(sharded: Sharded, settings: Config, group: dist.ProcessGroup | None) -> None:
    """Have blocks recomputed, if the configuration says so; the ranks of ``group`` have the same activations."""
    section = settings.activation_checkpointing
    if section.blocks:
        # where no two ranks have the same activations, there is nothing to partition
        partition = section.partition_activations and group is not None
        sharded.wrap_blocks(Checkpointer(replace(section, partition_activations=partition), group))


# In the order in which they are built #


def make_context(settings: Config, group: dist.ProcessGroup | None, device: torch.device) -> BuildContext:
    """Return what plugins are built with."""
    bare = BuildContext(
        device=device,
        compute_dtype=_compute_dtype(settings),
        group=group,
        gradient_dtype=_DTYPES[settings.data_types.grad_accum_dtype],
        keep_fp32=settings.data_types.keep_in_fp32_modules,
        accumulation=settings.gradient_accumulation_steps,
    )
    with_kernels = replace(bare, kernels=_kernels(settings.kernels.backend, bare))
    return replace(
        with_kernels,
        compression=cast("Compression | None", _selected(settings, "collectives", with_kernels)),
    )


def _compute_dtype(settings: Config) -> torch.dtype | None:
    return torch.bfloat16 if settings.bf16.enabled else torch.float16 if settings.fp16.enabled else None


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


def param_groups(model: nn.Module, given: Given) -> ParamGroups:
    """Return what to train as ``torch.optim`` groups."""
    if isinstance(given.optimizer, torch.optim.Optimizer):
        return given.optimizer.param_groups
    if given.model_parameters is None:
        return [{"params": [param for param in model.parameters() if param.requires_grad]}]
    if callable(given.model_parameters):
        return given.model_parameters(model)
    listed = list(given.model_parameters)
    if listed and isinstance(listed[0], Mapping):
        return [dict(entry) for entry in listed]
    return [{"params": listed}]


def optimizer_maker(
    settings: Config, optimizer: ClientOptimizer, groups: ParamGroups, context: BuildContext
) -> OptimizerMaker | None:
    """Return what makes the optimizer: the caller's, or the configuration's; None where nothing is trained."""
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


def make_partitioner(settings: Config, context: BuildContext) -> Partitioner:
    """Return the partitioner that the configuration selects, or ds-zero's."""
    return cast(
        "Partitioner", _selected(settings, "partitioner", context) or _default("ds.partitioner", "zero", context)
    )


def make_pipelines(settings: Config, context: BuildContext) -> PipelineBuilder:
    """Return the maker of pipelines that the configuration selects, or ds-pipe's."""
    made = _selected(settings, "pipeline", context) or _default("ds.pipeline", "pipe", context)
    return cast("PipelineBuilder", made)


def _default(group: str, name: str, context: BuildContext) -> object:
    plugin = registry.load(group, name)
    kind = plugin.config_type
    return plugin.build(None if kind is None else kind(), context)


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


def _policy(settings: Config, device: torch.device, rank: int, num_ranks: int) -> StepPolicy:
    precision = settings.bf16 if settings.bf16.enabled else settings.fp16
    return StepPolicy(
        train_batch_size=settings.train_batch_size,
        micro_batch_size=settings.train_micro_batch_size_per_gpu,
        accumulation=settings.gradient_accumulation_steps,
        rank=rank,
        num_ranks=num_ranks,
        clip=settings.gradient_clipping,
        skip_not_finite=settings.bf16.check_grad_overflow or not settings.bf16.enabled,
        cast_inputs=_compute_dtype(settings) if precision.auto_cast else None,
        seed=settings.seed,
        device=device,
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
