"""One stage's computations on one micro-batch: forward, backward, and the two halves of a backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .deferred import DeferredWeights


class Kept(NamedTuple):
    """What a forward pass leaves for the backward pass of the same micro-batch."""

    inputs: list[Tensor]  # that require a gradient
    outputs: list[Tensor]  # that do, or the loss
    later: DeferredWeights | None  # weight gradients, where they are computed apart


class Stage:
    """A part of the model.

    Args:
        module: Maps what the stage before hands on to what this one does; of the first stage, the micro-batch.
        loss: Of the last stage: maps its output and the target to a number; None for others.
        splits: Whether input and weight gradients are computed apart.
    """

    def __init__(
        self, module: nn.Module, *, loss: Callable[[Any, Any], Tensor] | None = None, splits: bool = False
    ) -> None:
        self.module = module
        self._loss = loss
        self._splits = splits

    def forward(self, value: Any, target: Any, *, share: float) -> tuple[Any, Kept]:
        """Return what the next stage gets, or the loss, and what backward needs.

        Args:
            value: From the stage before, or the micro-batch.
            target: For the loss; others ignore it.
            share: Of this micro-batch in the step's loss.
        """
        given = pytree.tree_map(_entering, value)
        later = DeferredWeights() if self._splits and torch.is_grad_enabled() else None
        with later or nullcontext():
            out = self.module(given)
            if self._loss is not None:
                out = self._loss(out, target)
        outputs = [out * share] if self._loss is not None else _with_grad(out)
        return out, Kept(_with_grad(given), outputs, later)

    def backward(self, kept: Kept, grads: list[Tensor] | None) -> list[Tensor]:
        """Return the gradients of the inputs.

        Args:
            kept: From :meth:`forward`.
            grads: Of its outputs; None for the loss.
        """
        if kept.outputs:
            torch.autograd.backward(kept.outputs, grads)
        return [torch.zeros_like(given) if given.grad is None else given.grad for given in kept.inputs]

    def settle(self, kept: Kept) -> None:
        """Compute the weight gradients that :meth:`backward` left out."""
        if kept.later is not None:
            kept.later.settle()


def _entering(leaf: Any) -> Any:
    """Cut a tensor off from what computed it, which may be another stage on this rank."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _with_grad(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad]
