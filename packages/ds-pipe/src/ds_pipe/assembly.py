"""Makes a part of a model out of the description of its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .keyed import seed_generators
from .layers import Layer, Modules, Tie
from .part import Borrowed, Part, Step


def assemble(
    layers: Sequence[Layer],
    ties: Mapping[str, Tie],
    indices: range,
    *,
    borrows: Mapping[str, str],
    seed: int,
    interval: int,
) -> Part:
    """Return the part with the layers ``indices``; sets the default generators.

    Args:
        layers: Of the whole model.
        ties: Of the whole model.
        indices: Which layers.
        borrows: As of ``PipelineModule.build``.
        seed: Each layer is made from it and its index.
        interval: Layers that are recomputed together.

    Raises:
        ValueError: As of ``PipelineModule.build``.
    """
    _check_buffers(layers, indices)
    needs = _needs(ties, indices, borrows)
    made: dict[int, Modules] = {}
    steps = []
    for index in indices:
        layer = layers[index]
        borrowed = {need.name: borrows[need.key] for need in needs if need.layer == index}
        if layer.uses not in made:
            # the other parameters of a foreign module stay on meta: who uses them gets an error
            modules = _made(layer, seed, nothing=layer.uses not in indices)
            made[layer.uses] = _without(modules, [*borrowed])
        modules = made[layer.uses]
        held = [Borrowed(skip, *_place(modules, name)) for name, skip in borrowed.items()]
        foreign = {} if layer.uses in indices else modules
        title = layer.title if layer.uses == index else f"{index}, again {layer.title}"
        steps.append(Step(index, title, layer.run, [*modules], foreign, held, layer.stashes, layer.pops))
    own = {path: module for index, modules in made.items() if index in indices for path, module in modules.items()}
    _share(ties, indices, own)
    return Part(own, steps, interval)


class _Need(NamedTuple):
    """A tied parameter that a part does not have."""

    layer: int
    key: str
    name: str


def _needs(ties: Mapping[str, Tie], indices: range, borrows: Mapping[str, str]) -> list[_Need]:
    found = [
        _Need(layer, key, name)
        for key, tie in ties.items()
        if tie.layers[0] < indices.start
        for layer, name in zip(tie.layers, tie.names, strict=True)
        if layer in indices
    ]
    for need in found:
        if need.key not in borrows:
            tie = ties[need.key]
            raise ValueError(
                f"the layers {list(tie.layers)} have the parameter {tie.names[0]} in common (ties[{need.key!r}]), and "
                f"a part with the layers {indices.start} ... {indices.stop - 1} has layer {need.layer} without layer "
                f"{tie.layers[0]}: borrow it, build(..., borrows={{{need.key!r}: name}}), or do not cut between them"
            )
    return found


def _check_buffers(layers: Sequence[Layer], indices: range) -> None:
    before: dict[Tensor, str] = {}
    for index, layer in enumerate(layers[: indices.stop]):
        for path, module in layer.make().items() if layer.ready else ():
            for name, buffer in module.named_buffers():
                if index < indices.start:
                    before[buffer] = f"{path}.{name}"
                elif buffer in before:
                    raise ValueError(
                        f"the buffer {before[buffer]} is also {path}.{name} of layer {index}, and layer "
                        f"{indices.start} begins another part: give each layer its own, or do not cut between them"
                    )


def _made(layer: Layer, seed: int, *, nothing: bool) -> Modules:
    """Return the modules of a layer; with ``nothing``, without memory."""
    seed_generators((seed + layer.uses) % 2**63)
    with torch.device("meta") if nothing and not layer.ready else nullcontext():
        return layer.make()


def _without(modules: Modules, names: Sequence[str]) -> Modules:
    """Return modules that have None for some parameters; those given keep them."""
    found = dict(modules)
    for path in modules:
        inside = [name.removeprefix(f"{path}.") for name in names if name.startswith(f"{path}.")]
        for name in inside:
            found[path] = _stripped(found[path], name.split("."))
    return found


def _stripped(module: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return a copy of ``module`` that shares everything but one parameter, which is None."""
    made = copy.copy(module)
    made._parameters, made._modules = module._parameters.copy(), module._modules.copy()
    head, *rest = path
    if not rest:
        made._parameters[head] = None
    else:
        made._modules[head] = _stripped(module.get_submodule(head), rest)
    return made


def _place(modules: Modules, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the parameter ``name``, and what it is called there."""
    for path, module in modules.items():
        if name.startswith(f"{path}."):
            inner, _, attribute = name.removeprefix(f"{path}.").rpartition(".")
            owner = module.get_submodule(inner)
            if attribute in owner._parameters:
                return owner, attribute
            names = ", ".join(own for own, _ in module.named_parameters()) or "none"
            raise ValueError(
                f"a tied weight is a parameter; layer {path} has no parameter {name.removeprefix(f'{path}.')!r}, "
                f"it has {names}: say which, TiedLayerSpec(..., tied_weight_attr=...)"
            )
    raise ValueError(f"a tied weight is a parameter; there is no {name} in the layers {list(modules)}")


def _share(ties: Mapping[str, Tie], indices: range, own: Modules) -> None:
    """Let layers of one part have tied parameters in common."""
    for tie in ties.values():
        if tie.layers[0] in indices:
            owner, attribute = _place(own, tie.names[0])
            for layer, name in zip(tie.layers, tie.names, strict=True):
                if layer in indices:
                    other, called = _place(own, name)
                    other._parameters[called] = owner._parameters[attribute]
