"""Blocks of a model whose forward can be replaced: compiled, or recomputed in the backward pass.

[Note: Blocks]
A block is a module of a unit with no other unit's module inside, so none of our hooks run within its ``forward``: they
stand around it. What replaces ``forward`` (an attribute of the instance) sees whole parameters and no communication.
Single layers of torch are left out: there is nothing in them to fuse, and nothing worth recomputing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .units import Unit


def blocks_of(units: Sequence[Unit]) -> list[nn.Module]:
    """Return the blocks of all ``units``, in model order; see [Note: Blocks]."""
    modules = list(dict.fromkeys(module for unit in units for module in unit.modules))
    homes = set(modules)
    return [
        module
        for module in modules
        if not _is_single_layer(module) and not any(inner in homes for inner in module.modules() if inner is not module)
    ]


def compile_blocks(blocks: Sequence[nn.Module], **settings: Any) -> None:
    """Let ``torch.compile`` compile the forward of each block at its first call.

    Raises:
        ValueError: There is no block.
    """
    if not blocks:
        raise ValueError(
            "no block to compile: every unit is a single layer, or has other units inside; name the classes of the "
            "model's blocks in unit_classes"
        )
    for block in blocks:
        block.forward = torch.compile(block.forward, **settings)


def _is_single_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None
