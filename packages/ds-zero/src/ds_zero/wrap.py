"""Which parameters form a unit.

[Note: Units of a model]
A *block* is a child of a ``ModuleList`` or ``Sequential`` (or of a class the user names): its parameters form one
unit. Whatever parameter is left belongs to the module that holds it directly; neighbouring left-overs are joined
while they are small. A parameter shared by several blocks or modules (tied weights) forms a unit with all of its
holders. Modules of torch that read their children's parameters without calling them count as blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

_SMALL = 1 << 20
"""Left-over modules are joined up to this many elements: below, latency costs more than the data."""

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_READ_THEIR_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Group(NamedTuple):
    """Modules and parameters of a unit to be."""

    name: str
    modules: list[nn.Module]  # before whose forward the parameters are needed
    params: list[tuple[str, nn.Parameter]]  # by fully qualified name

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel() for _, param in self.params)


class _Home(NamedTuple):
    """Where a parameter is used: in a block, or in the module that holds it."""

    name: str
    module: nn.Module
    is_block: bool


def units_of(model: nn.Module, classes: Sequence[str] = ()) -> list[Group]:
    """Group all parameters of ``model``; see [Note: Units of a model].

    Args:
        model: Any module.
        classes: Class names of blocks; empty finds them.

    Returns:
        Groups in model order; each parameter stands in exactly one, under its first name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> [(group.name, group.numel) for group in units_of(model)]
        [('0', 6), ('2', 6)]
    """
    blocks = dict(_named_blocks(model, classes) if classes else _found_blocks(model, ""))
    if classes and not blocks:
        present = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"unit_classes {list(classes)} name no module of the model; it has {', '.join(present)}")
    # one within a block stays part of that block: see _home
    blocks |= {name: module for name, module in model.named_modules() if isinstance(module, _READ_THEIR_CHILDREN)}
    names = {param: name for name, param in model.named_parameters()}
    homes: dict[nn.Parameter, list[_Home]] = {}
    for module_name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            home = _home(module_name, module, blocks)
            known = homes.setdefault(param, [])
            if home not in known:
                known.append(home)
    return _join_small(_collect(homes, names))


def _home(name: str, module: nn.Module, blocks: dict[str, nn.Module]) -> _Home:
    for prefix in _prefixes(name):
        if prefix in blocks:
            return _Home(prefix, blocks[prefix], is_block=True)
    return _Home(name, module, is_block=False)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".") if name else []
    for length in range(len(parts) + 1):
        yield ".".join(parts[:length])


def _collect(homes: dict[nn.Parameter, list[_Home]], names: dict[nn.Parameter, str]) -> list[tuple[Group, bool]]:
    """Group parameters by their homes; the flag says whether the group may be joined with its neighbours."""
    groups: dict[tuple[str, ...], tuple[Group, bool]] = {}
    for param, where in homes.items():
        key = tuple(home.name for home in where)
        if key not in groups:
            modules = [home.module for home in where]
            # a module around other modules, and tied ones, stay whole for long: nothing may be drawn into their unit
            alone = len(where) == 1 and not where[0].is_block
            joinable = alone and next(where[0].module.children(), None) is None
            groups[key] = (Group("+".join(key) or "(root)", modules, []), joinable)
        groups[key][0].params.append((names[param], param))
    return list(groups.values())


def _join_small(groups: list[tuple[Group, bool]]) -> list[Group]:
    joined: list[Group] = []
    previous_joinable = False
    for group, joinable in groups:
        if joinable and previous_joinable and joined[-1].numel + group.numel <= _SMALL:
            last = joined[-1]
            joined[-1] = Group(f"{last.name}+{group.name}", last.modules + group.modules, last.params + group.params)
        else:
            joined.append(group)
        previous_joinable = joinable
    return joined


def _named_blocks(model: nn.Module, classes: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            yield name, module


def _found_blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(module, _CONTAINERS) and not _is_container_of_blocks(child):
            yield path, child
        else:
            yield from _found_blocks(child, path)


def _is_container_of_blocks(module: nn.Module) -> bool:
    """Whether ``module`` only holds others: it is never called itself, or chains compound modules (a stage)."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    compound = any(next(child.children(), None) is not None for child in module.children())
    return isinstance(module, nn.Sequential) and compound
