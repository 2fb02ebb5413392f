"""The optimizer over partitioned parameters: its groups, what they hold on this rank, and the rule that steps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from .kinds import Arranged, UpdateKind, arrange
from .own import OwnGradients
from .tensor_sums import ShardSums, SumsOfSquares
from .whole import WholeTensors

if TYPE_CHECKING:
    from ds_core.exchange_protocols import ExchangingOptimizer
    from ds_core.protocols import ParamGroups, UpdateRule

    from .flat import Resources
    from .units import Unit


class TakesSums(Protocol):
    """What an optimizer has to offer whose groups declare ``statistics``."""

    def share_sums(self, sums: SumsOfSquares) -> None:
        """Take sums of squares over whole tensors from ``sums`` from now on: parameters are parts of tensors."""


class Made(NamedTuple):
    """An optimizer over this rank's share of the parameters."""

    optimizer: torch.optim.Optimizer | None
    update: UpdateRule  # runs its step
    whole: WholeTensors
    own: OwnGradients


def own_groups(
    model: nn.Module,
    param_groups: ParamGroups | None,
    make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None,
) -> Arranged:
    """Return the groups of the optimizer over those parameters of the model that require a gradient, and their kinds.

    Raises:
        ValueError: The groups name a parameter twice or one that is not the model's, or declare no known kind.
    """
    names: dict[nn.Parameter, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param] = f"{names[param]}, {name}" if param in names else name
    if make_optimizer is None:
        return Arranged([], [])
    return arrange(_checked(param_groups, names), names, make_optimizer)


def _checked(param_groups: ParamGroups | None, names: Mapping[nn.Parameter, str]) -> ParamGroups:
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


def check_own(stage: int, *, compressed: bool, hybrid: bool, exact: bool, name: str) -> None:
    """Refuse settings under which an optimizer cannot exchange messages itself.

    Raises:
        ValueError: There are some.
    """
    where = f"optimizer {name} exchanges messages itself, and updates whole weights on every rank"
    instead = "or another optimizer with zero_quantized_gradients, which sends few bits at every stage"
    if stage == 3:
        raise ValueError(f"{where}: at stage {stage} no rank has them; use stage 0, 1 or 2, {instead}")
    if hybrid:
        raise ValueError(f"{where}, over all ranks at once: remove mics_shard_size, or use {instead[3:]}")
    if compressed:
        raise ValueError(
            f"{where}, so rounding weights on their way would be lost on it: remove zero_quantized_weights "
            "(weights of the section collectives)"
        )
    if exact:
        raise ValueError(f"require_exact = True, but {name} rounds what it sends; use another one")


def make_over(
    units: Sequence[Unit],
    arranged: Arranged,
    make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None,
    update: UpdateRule,
    shared: Resources,
) -> Made:
    """Make the optimizer over this rank's shards, parts of tensors and whole tensors, as each group's kind wants.

    Args:
        units: All parameters, partitioned.
        arranged: What :func:`own_groups` returned.
        make_optimizer: Makes the optimizer.
        update: Runs the step over what the optimizer holds.
        shared: Communication, and the data type of gradients.
    """
    groups, kinds = arranged.groups, arranged.kinds
    flats = [flat for unit in units for flat in unit.trained_flats]
    holders = shared.mesh.holders_of(shared.placements.state, shared.kernels)
    whole = WholeTensors(flats, kinds, holders, shared.gradient_dtype)
    if make_optimizer is None:
        return Made(None, update, whole, OwnGradients(flats, None, shared))
    params: list[list[Any]] = [[] for _ in groups]
    for segment in (segment for flat in flats for segment in flat.segments):
        if not kinds[segment.group].whole:
            params[segment.group].append(segment.master)
    for each in whole.stepped:
        params[each.slot.group].append(each.param)
    optimizer = make_optimizer([{**entry, "params": own} for entry, own in zip(groups, params, strict=True)])
    counted = [group for group, kind in enumerate(kinds) if kind is UpdateKind.STATISTICS]
    if counted:
        cast("TakesSums", optimizer).share_sums(ShardSums(flats, counted, holders.comm))
    exchanging = cast("ExchangingOptimizer", optimizer) if arranged.exchanges else None
    own = OwnGradients(flats, exchanging, shared)
    return Made(optimizer, partial(whole.update, update) if whole.groups else update, whole, own)
