"""The public function: partition a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from .config import Precision, ZeroConfig
from .construct import prepare, settle_rest
from .flat import Flat, Resources, StoragePool
from .kept import compute_dtypes
from .kernels import TorchKernels
from .layout import Spec, plan
from .mesh import mesh_of
from .placement import Placement, placements_of
from .sharded import Sharded
from .units import Unit
from .update import torch_update
from .wrap import Group, units_of

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, ParamGroups, ShardKernels, UpdateRule

logger = logging.getLogger(__package__)

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)
_FROZEN = -1  # parameter group of what no optimizer updates


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Collaborators of :func:`shard`; each has a plain torch default."""

    update: UpdateRule = torch_update
    """How the optimizer's step is run over shards: a fused kernel goes here."""
    kernels: ShardKernels | None = None
    """Ordered sums and norms; None: torch operations."""
    collectives: Collectives | None = None
    """Communication; None: ``torch.distributed`` over ``group``."""


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
        make_optimizer: Makes an *elementwise* optimizer (each element is updated from its own gradient and state
            alone, as in SGD and Adam) from parameter groups whose parameters are flat float32 shards. None:
            nothing is trained.
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
        ValueError: The groups name a parameter twice or one that is not the model's; or ranks built different models;
            or the number of ranks is not a power of two and ``config.require_exact`` is set.
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
    mesh = mesh_of(group, parts.collectives, kernels=kernels, config=config, device=device)
    comm = mesh.everyone
    _check_num_ranks(comm, config)
    hybrid = mesh.across.size > 1
    placements = placements_of(
        config.stage,
        comm.size,
        mics=hybrid and config.mics_shard_size > 0,
        hpz=hybrid and config.zero_hpz_partition_size > 1,
    )
    shared = Resources(mesh, kernels, StoragePool(), StoragePool(comm.allocate), placements, precision.gradient)
    groups = _own_groups(model, param_groups) if make_optimizer else []
    group_of = {param: index for index, entry in enumerate(groups) for param in entry["params"]}
    prepare(model, comm, device)
    units = _build_units(model, config, compute_dtypes(model, precision), group_of, shared)
    settle_rest(model)
    _broadcast_buffers(model, comm)
    optimizer = make_optimizer(_shard_groups(groups, units)) if make_optimizer else None
    return Sharded(model, units, optimizer, update=parts.update, shared=shared)


def _device_of(model: nn.Module) -> torch.device:
    devices = (param.device for param in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.get_default_device())


def _check_num_ranks(comm: Collectives, config: ZeroConfig) -> None:
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


def _own_groups(model: nn.Module, param_groups: ParamGroups | None) -> ParamGroups:
    """Return ``param_groups`` with lists of parameters that require a gradient, checked against the model."""
    names = {param: name for name, param in model.named_parameters()}
    if param_groups is None:
        param_groups = [{"params": list(names)}]
    seen: set[nn.Parameter] = set()
    groups = []
    for index, entry in enumerate(param_groups):
        params = [entry["params"]] if isinstance(entry["params"], nn.Parameter) else list(entry["params"])
        for param in params:
            if param not in names:
                raise ValueError(
                    f"parameter group {index} holds a parameter of shape {list(param.shape)} that is not the model's"
                )
            if param in seen:
                raise ValueError(f"parameter {names[param]!r} stands in more than one optimizer parameter group")
            seen.add(param)
        groups.append({**entry, "params": [param for param in params if param.requires_grad]})
    return groups


def _build_units(
    model: nn.Module,
    config: ZeroConfig,
    dtypes: dict[nn.Parameter, torch.dtype],
    group_of: dict[nn.Parameter, int],
    shared: Resources,
) -> list[Unit]:
    sharded = shared.placements.param is not Placement.REPLICATE
    units, num_flats = [], 0
    for group in units_of(model, config.unit_classes):
        flats = []
        for (dtype, trained), named in _by_kind(group, dtypes, group_of).items():
            specs = [Spec(name, param.shape, group_of.get(param, _FROZEN)) for name, param in named]
            layout = plan(specs, shared.mesh.everyone.size)
            by_name = dict(named)
            params = [by_name[slot.name] for slot in layout.slots]
            flats.append(Flat(layout, params, dtype=dtype, trained=trained, key=num_flats, shared=shared))
            num_flats += 1
        units.append(Unit(group.name, group.modules, flats, sharded=sharded))
    return units


def _by_kind(
    group: Group, dtypes: dict[nn.Parameter, torch.dtype], group_of: dict[nn.Parameter, int]
) -> dict[tuple[torch.dtype, bool], list[tuple[str, nn.Parameter]]]:
    """Split a group's parameters by compute data type and by whether they are trained."""
    kinds: dict[tuple[torch.dtype, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, param in group.params:
        trained = param in group_of
        if trained and param.dtype not in _TRAINABLE:
            raise NotImplementedError(
                f"parameter {name!r} is {param.dtype}: the optimizer works on float32; convert the model first, for "
                "example with model.float()"
            )
        kinds.setdefault((dtypes[param], trained), []).append((name, param))
    return kinds


def _shard_groups(groups: ParamGroups, units: Sequence[Unit]) -> ParamGroups:
    """Return the parameter groups over this rank's shards; the settings stay."""
    shards: list[list[Any]] = [[] for _ in groups]
    for unit in units:
        for flat in unit.flats:
            for segment in flat.segments:
                shards[segment.group].append(segment.master)
    return [{**entry, "params": params} for entry, params in zip(groups, shards, strict=True)]


def _broadcast_buffers(model: nn.Module, comm: Collectives) -> None:
    for buffer in model.buffers():
        comm.broadcast(buffer)
