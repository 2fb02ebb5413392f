"""Optimizer state of whole tensors, in any shape and nesting, as named pieces and a description of the rest.

[Note: State of whole tensors]
An optimizer may keep anything per tensor: moments of its shape, row and column sums, lists of preconditioners,
counters. Tensors become pieces, whole and in their own shape, under the name of the parameter; their role is the path
to them, ``momentum_buffer`` or ``preconditioners.0``. The description, JSON in the scalars, holds everything else and
says where the tensors belong; numbers in tensors without a dimension stand in it as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .state import PLAIN, Piece

if TYPE_CHECKING:
    from ds_core.protocols import Json, StateSource

    from .flat import Flat
    from .state import Key
    from .whole import Stepped, WholeTensors


# Export #


def pieces(whole: WholeTensors, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """Yield the tensors of the optimizer's state that this rank exports, each whole."""
    for each in _exported(whole):
        for role, value in _tensors(optimizer.state.get(each.param, {}), ""):
            yield Piece(each.slot.name, role, value.shape, 0, value.detach().reshape(-1))


def scalars(whole: WholeTensors, optimizer: torch.optim.Optimizer) -> dict[str, Json]:
    """Return which parameter groups are stepped as whole tensors, and the description of their state by name."""
    if not whole.groups:
        return {}
    described: dict[str, Json] = {
        each.slot.name: _encoded(optimizer.state[each.param], "")
        for each in _exported(whole)
        if each.param in optimizer.state
    }
    return {"whole_groups": list(whole.groups), "whole": described}


# Import #


def check(whole: WholeTensors, saved: Mapping[str, Any]) -> None:
    """Refuse state that was cut in another way.

    Raises:
        ValueError: Other parameter groups were stepped as whole tensors.
    """
    there = saved.get("whole_groups", [])
    if list(there) != whole.groups:
        raise ValueError(
            f"the state to load is of an optimizer that stepped the parameter groups {there} as whole tensors, this "
            f"run does so with {whole.groups}: declare 'update_kind' of the groups as it was; nothing was changed"
        )


def wanted(trained: Sequence[Flat], saved: Mapping[str, Any]) -> dict[Key, torch.Size]:
    """Return the shape of every tensor that ``saved`` describes, of the parameters in ``trained``."""
    described = saved.get("whole", {})
    names = {slot.name for flat in trained for slot in flat.layout.slots}
    return {
        (role, name): torch.Size(entry["shape"])
        for name in described
        if name in names
        for role, entry in _described(described[name], "")
    }


def load(
    whole: WholeTensors,
    optimizer: torch.optim.Optimizer,
    source: StateSource,
    saved: Mapping[str, Any],
    known: Collection[Key],
) -> None:
    """Replace the optimizer's state of the stepped tensors; that of a tensor not all ``known`` stays as it is."""
    described = saved.get("whole", {})
    for each in whole.stepped:
        name = each.slot.name
        if name not in described:
            optimizer.state.pop(each.param, None)
        elif all((role, name) in known for role, _ in _described(described[name], "")):
            optimizer.state[each.param] = _decoded(described[name], "", name, source, each.param.device)


# Nesting #


def _exported(whole: WholeTensors) -> Iterator[Stepped]:
    return (each for each in whole.stepped if each.exported)


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with a dimension below ``value``, with their paths."""
    if isinstance(value, Tensor):
        if value.dim() and value.numel():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, _below(path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, _below(path, index))


def _encoded(value: Any, path: str) -> Json:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.dim() == 0:
            return {"number": value.item(), "dtype": dtype}
        return {"shape": list(value.shape), "dtype": dtype}
    if isinstance(value, PLAIN):
        return {"value": value}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(item, _below(path, key)) for key, item in value.items()}}
    if type(value) in (list, tuple):
        items: Sequence[Json] = [_encoded(item, _below(path, index)) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    raise NotImplementedError(
        f"optimizer state {path!r} is a {type(value).__name__}, neither a tensor, a number or a text nor a list, tuple "
        "or dictionary of such: this optimizer cannot be saved"
    )


def _described(entry: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the entries of tensors with elements, with their paths: their roles."""
    if "shape" in entry and 0 not in entry["shape"]:
        yield path, entry
    for key, item in entry.get("dict", {}).items():
        yield from _described(item, _below(path, key))
    for index, item in enumerate([*entry.get("list", ()), *entry.get("tuple", ())]):
        yield from _described(item, _below(path, index))


def _decoded(entry: Mapping[str, Any], path: str, name: str, source: StateSource, device: torch.device) -> Any:
    """Invert :func:`_encoded`, reading the tensors."""
    if "value" in entry:
        return entry["value"]
    if "number" in entry:
        # counters stay on the host, as torch has it
        where = None if path.rpartition(".")[2] == "step" else device
        return torch.tensor(entry["number"], dtype=getattr(torch, entry["dtype"]), device=where)
    if "shape" in entry:
        flat = torch.empty(torch.Size(entry["shape"]).numel(), dtype=getattr(torch, entry["dtype"]), device=device)
        if flat.numel():
            source.read(path, name, 0, flat)
        return flat.view(entry["shape"])
    if "dict" in entry:
        return {key: _decoded(item, _below(path, key), name, source, device) for key, item in entry["dict"].items()}
    ((kind, items),) = entry.items()
    decoded = [_decoded(item, _below(path, index), name, source, device) for index, item in enumerate(items)]
    return tuple(decoded) if kind == "tuple" else decoded


def _below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
