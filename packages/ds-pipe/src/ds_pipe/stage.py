"""One stage's computations on one micro-batch: forward, backward, and the two halves of a backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def forward(self, value: Any, target: Sequence[Any], *, scale: float) -> tuple[Any, Kept]:
        """Return what the next stage gets, or the loss, and what backward needs.

        Args:
            value: From the stage before, or the micro-batch.
            target: One, for the loss; or none, and the output is returned.
            scale: Of the loss, before its backward pass.
        """
        given = pytree.tree_map(_entering, value)
        later = DeferredWeights() if self._splits and torch.is_grad_enabled() else None
        with later or nullcontext():
            out = self.module(given)
            loss = None if self._loss is None or not target else self._loss(out, target[0])
        if loss is not None:
            return loss, Kept(_with_grad(given), [loss * scale], later)
        return out, Kept(_with_grad(given), _with_grad(out), later)

    def backward(self, kept: Kept, grads: list[Tensor] | None) -> list[Tensor]:
        """Return the gradients of the inputs.

        Args:
            kept: From :meth:`forward`.
            grads: Of its outputs; None for the loss.
        """
        if not kept.outputs:
            found: list[Tensor | None] = [None for _ in kept.inputs]
        elif kept.later is None:
            torch.autograd.backward(kept.outputs, grads)
            found = [given.grad for given in kept.inputs]
        else:
            found = self._inputs_only(kept, kept.later, grads)
        return [
            torch.zeros_like(given) if grad is None else grad for given, grad in zip(kept.inputs, found, strict=True)
        ]

    def settle(self, kept: Kept) -> None:
        """Compute the weight gradients that :meth:`backward` left out."""
        if kept.later is not None:
            kept.later.settle()

    def _inputs_only(self, kept: Kept, later: DeferredWeights, grads: list[Tensor] | None) -> list[Tensor | None]:
        """Return the gradients of the inputs; those of parameters wait for :meth:`settle`.

        Parameters get theirs in one backward pass of their own then, whatever kind of layer they belong to.
        """
        params = [param for param in self.module.parameters() if param.requires_grad]
        if not kept.inputs and not params:
            return []
        found = torch.autograd.grad(kept.outputs, [*kept.inputs, *params], grads, allow_unused=True)
        later.keep(params, found[len(kept.inputs) :])
        return list(found[: len(kept.inputs)])


def _entering(leaf: Any) -> Any:
    """Cut a tensor off from what computed it, which may be another stage on this rank."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _with_grad(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad]
