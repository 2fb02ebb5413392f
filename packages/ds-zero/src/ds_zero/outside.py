"""Sharded parameters that are read outside the forward pass of their unit.

[Note: Reads from outside]
Code may read a parameter of another module: ``F.linear(x, self.tokens.weight)`` in a parent's forward, a sibling's
``other.weight``, or a module that returns its own parameter or a view of it. Before the read the unit is made whole;
but it may be resharded before the value is used, and nothing would make it whole again before the backward pass of
the operation that used it. So what such code gets is a *copy*, which lives as long as autograd or the caller needs
it; its gradient goes on to the parameter. Costs: the copy, from the read to the backward pass of what uses it; and a
gather even where only ``weight.dtype`` is looked at.

Reads are seen in the module's own dictionary of parameters, which is replaced by one that looks whether the unit is in
use. They count within a forward pass of the partitioned model, and in recomputation during a backward pass; as with
every forward pass, all ranks make the same ones. Elsewhere they give NaN and communicate nothing. A parameter reached
on another way (a list the model keeps) is not seen; its gradient then arrives while its unit is not whole, which is
an error that names it.

Compiled code sees through the dictionary. Where it meets a parameter of a module that lies in no block it is
interrupted, and the read happens as above; a parameter of another block is not seen.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .units import Phase, Residency, Unit, WatchedParams, in_backward

_APART = "a block reads a parameter of a module that lies in no block; pass the value in, or compile without fullgraph"


class OutsideReads:
    """See [Note: Reads from outside].

    Args:
        units: All units of the model.
        residency: Brings them in.
    """

    def __init__(self, units: Sequence[Unit], residency: Residency) -> None:
        self._unit_of = {param: unit for unit in units for flat in unit.flats for param in flat.params}
        self.seen: set[Unit] = set()  # read from outside at least once
        self.depth = 0  # forward passes of the model that are running, one within another
        self._residency = residency

    def watch(self, model: nn.Module) -> None:
        """Look at every read of a parameter from now on."""
        for module in model.modules():
            if module._parameters:
                watched = WatchedParams(module._parameters, self._unit_of, self._residency.in_use, self._read)
                vars(module)["_parameters"] = watched

    def watch_apart(self, model: nn.Module, compiled: Iterable[nn.Module]) -> None:
        """Let ``compiled`` code be interrupted where it reads a parameter of a module of ``model`` outside of it."""
        read = torch.compiler.disable(WatchedParams.__getitem__, reason=_APART)
        apart = type("ApartParams", (WatchedParams,), {"__slots__": (), "__getitem__": read})
        inside = {module for block in compiled for module in block.modules()}
        for module in model.modules():
            if module._parameters and module not in inside:
                params = apart(module._parameters, self._unit_of, self._residency.in_use, self._read)
                vars(module)["_parameters"] = params

    def _read(self, param: nn.Parameter, unit: Unit) -> Tensor:
        """Return what code gets that reads ``param`` while ``unit`` is not in use."""
        # hooks of users run in a backward pass, too, but without gradients; recomputation runs with them
        if not (self.depth > 0 or (in_backward() and torch.is_grad_enabled())):
            return param
        self._residency.need(unit, Phase.BACKWARD if in_backward() else Phase.FORWARD)
        copied = param.clone()
        self._residency.idle(unit)
        self.seen.add(unit)
        return copied


def without_views(value: Any, unit: Unit) -> Any:
    """Return what a forward pass of ``unit`` returned, with copies in place of its parameters and of views of them."""
    leaves, spec = pytree.tree_flatten(value)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.untyped_storage()._cdata in unit.memory:
                leaves[index] = leaf.clone()
        elif dataclasses.is_dataclass(leaf):
            leaves[index] = copied = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                object.__setattr__(copied, field.name, without_views(getattr(leaf, field.name), unit))
    return pytree.tree_unflatten(leaves, spec)
