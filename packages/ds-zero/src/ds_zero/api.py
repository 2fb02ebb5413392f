"""The public function: partition a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from .agreement import check_settings_agree
from .building import build_units
from .config import Precision, ZeroConfig
from .construct import prepare, settle_rest
from .flat import Resources, StoragePool
from .kept import compute_dtypes
from .kernels import TorchKernels
from .mesh import mesh_of
from .optimizing import check_own, make_over, own_groups
from .placement import placements_of
from .sharded import Sharded
from .update import torch_update

if TYPE_CHECKING:
    from ds_core.kernel_protocols import ShardKernels
    from ds_core.protocols import Collectives, Compression, ParamGroups, UpdateRule

logger = logging.getLogger(__package__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Collaborators of :func:`shard`; each has a plain torch default."""

    update: UpdateRule = torch_update
    """How the optimizer's step is run over shards: a fused kernel goes here."""
    kernels: ShardKernels | None = None
    """Ordered sums and norms; None: torch operations."""
    collectives: Collectives | None = None
    """Communication; None: ``torch.distributed`` over ``group``."""
    compression: Compression | None = None
    """What is put around the collectives of trained weights and their gradients: equal bits on other numbers of ranks
    are given up for fewer bytes. None: nothing."""
    separate: Mapping[nn.Parameter, int] = field(default_factory=dict)
    """Parameters that are summed apart, one sum for each number, in ``GradNorm.squares``: blocks of which other ranks
    have others. They have buffers and messages of their own."""


def shard(
    model: nn.Module,
    make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None,
    *,
    config: ZeroConfig | None = None,
    group: dist.ProcessGroup | None = None,
    param_groups: ParamGroups | None = None,
    precision: Precision | None = None,
    parts: Parts | None = None,
    device: torch.device | None = None,
) -> Sharded:
    """Partition ``model`` over the ranks of ``group``, in place.

    Memory per rank for P parameters on N ranks with Adam, in bytes, float32 / bfloat16 compute (gradient sums in
    float32), besides two units in flight:

    =====  ================  ==========================
    stage  float32           bfloat16
    =====  ================  ==========================
    0      16 P              18 P
    1      8 P + 8 P / N     4 P + 16 P / N
    2      4 P + 12 P / N    2 P + 16 P / N
    3      16 P / N          18 P / N
    =====  ================  ==========================

    Communication per rank and micro-batch, in elements sent: P for the gradients (stages 0-3) and 2 P for the
    parameters in stage 3; per step P for the parameters (stages 1, 2) or the gradient sums (stage 0).

    With the same micro-batch size and the same global micro-batches, parameters and optimizer state are equal bit
    for bit after training on 1, 2, 4, 8 ... ranks, at any stage: accumulation step i on rank r of N has to be
    global micro-batch ``i * N + r``.

    Args:
        model: Built the same way on every rank: in memory, where rank 0's values are taken, parameter by parameter;
            under :func:`ds_zero.deferred`, where no rank ever holds more than its part and one whole tensor; or on the
            meta device, if its modules have ``reset_parameters``. Its parameters become views of flat
            buffers; at stage 3 they read as NaN outside the forward and backward pass of their module.
        make_optimizer: Makes any optimizer from parameter groups. It is called twice: on stand-ins for the model's
            parameters, to find out what its updates depend on (see :class:`ds_zero.kinds.UpdateKind`), and on float32
            shards or whole tensors accordingly. None: nothing is trained.
        config: Stage and units.
        group: The ranks. None: all of them, or this process alone where ``torch.distributed`` is not initialised.
        param_groups: As for ``torch.optim``, over the parameters of ``model``. None: one group of all that
            require a gradient.
        precision: Data types.
        parts: Collaborators to use instead of plain torch.
        device: Where what stands on the meta device is made; None: with the rest of the model, or on torch's default
            device. The meta device: it stays there, without values, which is enough to count memory and traffic.

    Returns:
        The partitioned model; call its ``module``.

    Raises:
        ValueError: The groups name a parameter twice or one that is not the model's; or ranks built different models
            or pass different settings; or the model is partitioned already; or ``config.require_exact`` is set, and
            the number of ranks is not a power of two or ``parts.compression`` is given.
        TypeError: ``make_optimizer`` is no function that returns an optimizer.
        NotImplementedError: A trained parameter is neither float32 nor bfloat16 nor float16.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> sharded = shard(model, lambda groups: torch.optim.AdamW(groups, lr=0.1), config=ZeroConfig(stage=2))
        >>> sharded.module(torch.ones(2, 4)).sum().backward()
        >>> sharded.step()

    Reference:
        Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.
    """
    config, precision, parts = config or ZeroConfig(), precision or Precision(), parts or Parts()
    kernels = parts.kernels or TorchKernels()
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    device = device or _device_of(model)
    arranged = own_groups(model, param_groups, make_optimizer)
    check_settings_agree(config, precision, arranged, group=group, given=parts.collectives, device=device)
    mesh, wire, diagnosis = mesh_of(group, parts, kernels=kernels, config=config, device=device)
    comm = mesh.everyone
    _check_exact(comm, config, parts.compression)
    hybrid = mesh.across.size > 1
    if arranged.exchanges:
        check_own(
            config.stage,
            compressed=parts.compression is not None and parts.compression.rounds_weights,
            hybrid=hybrid,
            exact=config.require_exact,
            name=arranged.optimizer,
        )
    placements = placements_of(
        # at stage 0 replicas of its state would save nothing: weights are gathered instead of gradients
        max(config.stage, 1) if arranged.exchanges else config.stage,
        comm.size,
        mics=hybrid and config.mics_shard_size > 0,
        hpz=hybrid and config.zero_hpz_partition_size > 1,
    )
    group_of = {param: index for index, entry in enumerate(arranged.groups) for param in entry["params"]}
    shared = Resources(
        mesh,
        kernels,
        StoragePool(),
        StoragePool(comm.allocate),
        placements,
        precision.gradient,
        frozenset(index for index, kind in enumerate(arranged.kinds) if kind.per_tensor),
        wire,
        parts.compression is not None and parts.compression.rounds_weights and comm.size > 1,
    )
    prepare(model, mesh, device)
    units = build_units(
        model, config.unit_classes, compute_dtypes(model, precision), group_of, shared, separate=parts.separate
    )
    settle_rest(model)
    diagnosis.learn(model, units)
    _broadcast_buffers(model, comm)
    optimizer, update, whole, own = make_over(units, arranged, make_optimizer, parts.update, shared)
    return Sharded(model, units, optimizer, update=update, whole=whole, own=own, shared=shared)


def _device_of(model: nn.Module) -> torch.device:
    devices = (param.device for param in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.get_default_device())


def _check_exact(comm: Collectives, config: ZeroConfig, compression: Compression | None) -> None:
    if compression is not None and config.require_exact:
        raise ValueError(
            "require_exact = True, but compressed collectives round what they send; remove them (collectives, "
            "zero_quantized_weights, zero_quantized_gradients), or use require_exact=False"
        )
    if comm.size & (comm.size - 1) == 0:
        return
    message = (
        f"{comm.size} ranks: not a power of two, so gradients are added in another order than on one rank and "
        "results agree with other numbers of ranks to rounding only"
    )
    if config.require_exact:
        raise ValueError(f"{message}; use a power of two, or require_exact=False")
    if comm.rank == 0:
        logger.warning(message)


def _broadcast_buffers(model: nn.Module, comm: Collectives) -> None:
    for buffer in model.buffers():
        comm.broadcast(buffer)
