"""One stage's computations on one micro-batch: forward, backward, and the two halves of a backward.

[Note: Order of sums]
Where a tensor is used several times, autograd adds up what the uses give, the latest use first. A stage keeps to that:
what it lends it makes views of after its forward pass, the nearest stage's first, so that the backward pass takes the
farthest stage's gradient first and the stage's own uses last. So the bits are those of the model in one piece, where
no stage between the first and the last that use a weight uses it twice. What a stage *hands* out is to be a view made
at that place, ``tensor.view_as(tensor)``, in the model in one piece, too: one place then adds up the gradient of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .deferred import DeferredWeights
from .handing import Handed

_NONE: Mapping[str, Any] = MappingProxyType({})


class Kept(NamedTuple):
    """What a forward pass leaves for the backward pass of the same micro-batch."""

    inputs: list[Tensor]  # that require a gradient
    outputs: list[Tensor]  # that do, or the loss
    later: DeferredWeights | None  # weight gradients, where they are computed apart
    taken: Mapping[str, list[Tensor]]  # skips of other stages, as far as they require a gradient
    handed: Mapping[str, list[Tensor]]  # and to other stages

    @property
    def leaves(self) -> list[Tensor]:
        """Inputs and skips."""
        return [*self.inputs, *(leaf for leaves in self.taken.values() for leaf in leaves)]


class Stage:
    """A part of the model.

    Args:
        module: Maps what the stage before hands on to what this one does; of the first stage, the micro-batch. Where
            it takes skips, they come as the keyword ``skips``, by name; where it hands some out, it returns
            :class:`Handed`.
        loss: Of the last stage: maps its output and the target to a number; None for others.
        splits: Whether input and weight gradients are computed apart.
        hands: Names of the skips it hands out, the farthest stage's first.
        lends: Weights of the module that other stages use, by the skip's name, the nearest stage's first.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        splits: bool = False,
        hands: Sequence[str] = (),
        lends: Mapping[str, Tensor] = _NONE,
    ) -> None:
        self.module = module
        self._loss = loss
        self._splits = splits
        self._hands = hands
        self._lends = lends
        # of a weight with several uses, gradients that come at different times are added up in another order
        uses = Counter(weight for _, weight in module.named_parameters(remove_duplicate=False)) if splits else Counter()
        self._at_once = [*lends.values(), *(weight for weight, count in uses.items() if count > 1)]

    def forward(
        self, value: Any, target: Sequence[Any], *, scale: float, skips: Mapping[str, Any] = _NONE
    ) -> tuple[Any, Mapping[str, Any], Kept]:
        """Return what the next stage gets, or the loss; what later ones get, by name; and what backward needs.

        Args:
            value: From the stage before, or the micro-batch.
            target: One, for the loss; or none, and the output is returned.
            scale: Of the loss, before its backward pass.
            skips: From other stages, by name.

        Raises:
            ValueError: The module does not hand out what it has to.
        """
        given, taken = pytree.tree_map(_entering, (value, dict(skips)))
        kept = Kept(_with_grad(given), [], None, {name: _with_grad(each) for name, each in taken.items()}, _NONE)
        later = None
        if self._splits and torch.is_grad_enabled():
            later = DeferredWeights([*self._at_once, *kept.leaves])
        with later or nullcontext():
            out = self.module(given, skips=taken) if taken else self.module(given)
            out, handed = self._checked(out) if self._hands else (out, _NONE)
            loss = None if self._loss is None or not target else self._loss(out, target[0])
        leaving = {name: _with_grad(handed[name]) for name in self._hands}
        leaving |= {name: _with_grad(weight.view_as(weight)) for name, weight in self._lends.items()}
        outputs = _with_grad(out) if loss is None else [loss * scale]
        return out if loss is None else loss, handed, kept._replace(outputs=outputs, later=later, handed=leaving)

    def backward(
        self, kept: Kept, grads: list[Tensor] | None, skip_grads: Mapping[str, list[Tensor]] = _NONE
    ) -> tuple[list[Tensor], Mapping[str, list[Tensor]]]:
        """Return the gradients of the inputs, and of the skips it took.

        Args:
            kept: From :meth:`forward`.
            grads: Of its outputs; None for the loss.
            skip_grads: Of the skips it handed out or lent.
        """
        roots = [tensor for tensors in kept.handed.values() for tensor in tensors] + kept.outputs
        root_grads: list[Tensor | None] = [grad for name in kept.handed for grad in skip_grads[name]]
        root_grads += [None] * len(kept.outputs) if grads is None else grads
        leaves = kept.leaves
        if not roots:
            found: list[Tensor | None] = [None for _ in leaves]
        elif kept.later is None:
            torch.autograd.backward(roots, root_grads)
            found = [leaf.grad for leaf in leaves]
        else:
            found = self._inputs_only(kept.later, leaves, roots, root_grads)
        whole = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)])
        return [next(whole) for _ in kept.inputs], {
            name: [next(whole) for _ in taken] for name, taken in kept.taken.items()
        }

    def settle(self, kept: Kept) -> None:
        """Compute the weight gradients that :meth:`backward` left out."""
        if kept.later is not None:
            kept.later.settle()

    def _checked(self, out: Any) -> Handed:
        if not isinstance(out, Handed) or sorted(out.skips) != sorted(self._hands):
            got = f"Handed with {sorted(out.skips)}" if isinstance(out, Handed) else str(type(out))
            raise ValueError(
                f"a stage with the skips {sorted(self._hands)} to hand out returns Handed with them; got {got}"
            )
        return out

    def _inputs_only(
        self, later: DeferredWeights, leaves: list[Tensor], roots: list[Tensor], root_grads: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the gradients of what came in; those of parameters wait for :meth:`settle`.

        Parameters get theirs in one backward pass of their own then, whatever kind of layer they belong to.
        """
        params = [param for param in self.module.parameters() if param.requires_grad]
        if not leaves and not params:
            return []
        found = later.grad(roots, root_grads, [*leaves, *params])
        later.keep(params, found[len(leaves) :])
        return found[: len(leaves)]


def _entering(leaf: Any) -> Any:
    """Cut a tensor off from what computed it, which may be another stage on this rank."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _with_grad(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad]
