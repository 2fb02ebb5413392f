"""Blocks of a model whose forward can be replaced: compiled, or recomputed in the backward pass.

[Note: Blocks]
A block is a module of a unit with no other unit's module inside, so none of our hooks run within its ``forward``: they
stand around it. What replaces ``forward`` (an attribute of the instance) sees whole parameters and no communication.
Single layers of torch are left out: there is nothing in them to fuse, and nothing worth recomputing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .units import Unit

if TYPE_CHECKING:
    from ds_core.protocols import BlockCall


class Blocks:
    """See [Note: Blocks].

    Args:
        units: All units of the model.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        modules = list(dict.fromkeys(module for unit in units for module in unit.modules))
        homes = set(modules)
        self.modules = [
            module
            for module in modules
            if not _is_single_layer(module)
            and not any(inner in homes for inner in module.modules() if inner is not module)
        ]
        self.is_compiled = False
        self._wrapped: list[_Wrapped] = []

    def compile(self, **settings: Any) -> None:
        """Let ``torch.compile`` compile the forward of each block at its first call."""
        if self.is_compiled:
            raise RuntimeError("the model is compiled already: compile it once, with all settings")
        self._check()
        for wrapped in self._wrapped:
            wrapped.forward = torch.compile(wrapped.forward, **settings)
        for block in () if self._wrapped else self.modules:
            block.forward = torch.compile(block.forward, **settings)
        self.is_compiled = True

    def wrap(self, call: BlockCall) -> None:
        """Run each block as ``call(forward, *args, **kwargs)``, outside of what is compiled."""
        if self._wrapped:
            raise RuntimeError("the blocks are wrapped already: wrap them once")
        self._check()
        for block in self.modules:
            wrapped = _Wrapped(block.forward, call)
            self._wrapped.append(wrapped)
            block.forward = wrapped

    def _check(self) -> None:
        if not self.modules:
            raise ValueError(
                "the model has no block: every unit is a single layer, or has other units inside; name the classes of "
                "the model's blocks in unit_classes"
            )


class _Wrapped:
    """The forward of one block."""

    def __init__(self, forward: Callable[..., Any], call: BlockCall) -> None:
        self.forward = forward
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.forward, *args, **kwargs)


def _is_single_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None
