"""From the parameters of a model to units of flat buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .flat import Flat, Resources
from .layout import Spec, plan
from .passes import check_not_partitioned
from .placement import Placement
from .units import Unit
from .wrap import Group, units_of

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)
_FROZEN = -1  # parameter group of what no optimizer updates


def build_units(
    model: nn.Module,
    unit_classes: Sequence[str],
    dtypes: dict[nn.Parameter, torch.dtype],
    group_of: dict[nn.Parameter, int],
    shared: Resources,
    *,
    separate: Mapping[nn.Parameter, int],
) -> list[Unit]:
    """Partition the parameters of a model.

    Args:
        model: Whose parameters become views of buffers.
        unit_classes: Class names of the modules whose parameters travel together.
        dtypes: Compute data type of each parameter.
        group_of: Parameter group of each trained parameter.
        shared: What the buffers share.
        separate: Parameters that have buffers of their own, one for each number.

    Raises:
        ValueError: The model is partitioned already.
        NotImplementedError: A trained parameter is neither float32 nor bfloat16 nor float16.
    """
    check_not_partitioned(model)
    sharded = shared.placements.param is not Placement.REPLICATE
    units, num_flats = [], 0
    for group in units_of(model, unit_classes):
        flats = []
        for kind, named in _by_kind(group, dtypes, group_of, separate).items():
            specs = [Spec(name, param.shape, group_of.get(param, _FROZEN)) for name, param in named]
            layout = plan(specs, shared.mesh.everyone.size)
            by_name = dict(named)
            params = [by_name[slot.name] for slot in layout.slots]
            flats.append(Flat(layout, params, **kind._asdict(), key=num_flats, shared=shared))
            num_flats += 1
        units.append(Unit(group.name, group.modules, flats, sharded=sharded))
    return units


class _Kind(NamedTuple):
    """Parameters of one kind have a buffer in common."""

    dtype: torch.dtype  # that they compute in
    trained: bool
    part: int | None  # of those that have buffers of their own


def _by_kind(
    group: Group,
    dtypes: dict[nn.Parameter, torch.dtype],
    group_of: dict[nn.Parameter, int],
    separate: Mapping[nn.Parameter, int],
) -> dict[_Kind, list[tuple[str, nn.Parameter]]]:
    """Split a group's parameters by kind."""
    kinds: dict[_Kind, list[tuple[str, nn.Parameter]]] = {}
    for name, param in group.params:
        trained = param in group_of
        if trained and param.dtype not in _TRAINABLE:
            raise NotImplementedError(
                f"parameter {name!r} is {param.dtype}: the optimizer works on float32; convert the model first, for "
                "example with model.float()"
            )
        kinds.setdefault(_Kind(dtypes[param], trained, separate.get(param)), []).append((name, param))
    return kinds
