"""Linear layers whose weight gradients are computed later.

[Note: Deferred weights]
Under :class:`DeferredWeights` every ``torch.nn.functional.linear`` computes the gradient of its input in the backward
pass and leaves a note of what the gradients of weight and bias need. ``settle`` computes them, and hands them to
autograd as gradients of the parameters, together with those of other layers, which ``keep`` has taken from the backward
pass: hooks run and sums are formed as always, with the same bits, and in one pass.

The backward pass, :meth:`DeferredWeights.grad`, runs under it, too: a checkpoint in a layer, whoever has made it, runs
the layer again there, and has to keep what the first run would have kept. So what was put off in the forward pass is
put off again, and nothing else: a function of one's own may run layers in its backward pass and ask for their
gradients there. autograd carries a mode over to its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DeferredWeights(TorchFunctionMode):
    """A context for a forward pass, and its backward pass; see [Note: Deferred weights].

    Memory: the input and the output's gradient of each layer, from the backward pass to ``settle``.

    Args:
        at_once: Leaves whose gradients the backward pass computes all the same.

    Example:
        >>> layer, later = torch.nn.Linear(2, 1), DeferredWeights()
        >>> given = torch.ones(3, 2, requires_grad=True)
        >>> with later:
        ...     out = layer(given).sum()
        >>> (grad,) = later.grad([out], [None], [given])
        >>> layer.weight.grad is None
        True
        >>> later.settle()
        >>> layer.weight.grad
        tensor([[3., 3.]])
    """

    def __init__(self, at_once: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._at_once: set[Tensor | None] = {*at_once}  # by identity
        self._put_off: set[Tensor] = set()  # weights, of the forward pass
        self._goes_back = False
        self._notes: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._known: dict[Tensor, Tensor] = {}  # gradients that need not be computed any more

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the place of linear layers; leave everything else as it is."""
        if func is functional.linear and torch.is_grad_enabled():
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        plain = not weight.requires_grad or not weight.is_leaf or (bias is not None and not bias.is_leaf)
        if plain or not input.requires_grad or not self._at_once.isdisjoint((weight, bias)):
            return functional.linear(input, weight, bias)
        if self._goes_back and weight not in self._put_off:
            return functional.linear(input, weight, bias)
        self._put_off.add(weight)
        out: Tensor = _Linear.apply(input, _Uses(weight, bias, self._notes))  # type: ignore[no-untyped-call]  # torch's
        return out

    def grad(
        self, roots: Sequence[Tensor], root_grads: Sequence[Tensor | None], leaves: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of leaves, without what is deferred; the functions of torch set modes aside.

        Args:
            roots: Where the backward pass begins.
            root_grads: Of each; None for a scalar: 1.
            leaves: None is returned for those that are not used.

        Raises:
            ValueError: There is no gradient of a root that is no scalar.
        """
        grads = tuple(_one(root) if grad is None else grad for root, grad in zip(roots, root_grads, strict=True))
        engine = torch.autograd.Variable._execution_engine
        self._goes_back = True
        with self:
            found = engine.run_backward(
                tuple(roots),
                grads,
                keep_graph=False,
                create_graph=False,
                inputs=tuple(leaves),
                allow_unreachable=True,
                accumulate_grad=False,
            )
        return [*found]

    def keep(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Keep gradients of parameters that are computed already, until :meth:`settle`."""
        self._known = {param: grad for param, grad in zip(params, grads, strict=True) if grad is not None}

    def settle(self) -> None:
        """Compute what was left out, and give it to the parameters."""
        # what several uses of a parameter give is added up first, as autograd does: another order has other bits
        grads, self._known = self._known, {}
        products: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
        for given, grad, weight, bias in self._notes:
            rows = grad.reshape(-1, grad.shape[-1])
            products.setdefault(weight, []).append((rows, given.reshape(-1, given.shape[-1])))
            if bias is not None and bias.requires_grad:
                summed = rows.sum(0)
                grads[bias] = grads[bias] + summed if bias in grads else summed
        self._notes.clear()
        # autograd takes the node made last first: so weights come in the order of a backward pass
        with torch.enable_grad():
            late = [_product(weight, each, grads.pop(weight, None)) for weight, each in [*products.items()][::-1]]
        del products
        if grads or late:
            torch.autograd.backward([*grads, *late], [*grads.values(), *(torch.empty_like(node) for node in late)])


def _one(root: Tensor) -> Tensor:
    if root.numel() != 1:
        raise ValueError(f"a backward pass begins at a scalar, the loss; got shape {tuple(root.shape)}: take its mean")
    return torch.ones_like(root)


class _Uses(NamedTuple):
    """What a layer computes with; autograd does not look into it.

    As arguments of their own, parameters would get an undefined gradient in the backward pass, and hooks would run.
    """

    weight: Tensor
    bias: Tensor | None
    notes: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]


class _Linear(torch.autograd.Function):
    """A linear layer that computes the gradient of its input only."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, uses: _Uses) -> Tensor:
        ctx.save_for_backward(given, uses.weight)
        ctx.uses = uses
        return functional.linear(given, uses.weight, uses.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        given, weight = ctx.saved_tensors
        (grad,) = grads
        ctx.uses.notes.append((given.detach(), grad, ctx.uses.weight, ctx.uses.bias))
        return grad.matmul(weight), None


def _product(weight: Tensor, products: list[tuple[Tensor, Tensor]], known: Tensor | None) -> Tensor:
    node: Tensor = _Products.apply(weight, products, known)  # type: ignore[no-untyped-call]  # torch's
    return node


class _Products(torch.autograd.Function):
    """A node whose backward pass computes the gradient of one weight.

    So one such gradient is there at a time, whose memory serves the next one; its sum with what was there takes it up.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, products: list[tuple[Tensor, Tensor]], known: Tensor | None) -> Tensor:
        ctx.products, ctx.known = products, known
        return weight.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        found = ctx.known
        for rows, given in ctx.products:
            product = rows.t().mm(given)
            found = product if found is None else found + product
        ctx.products.clear()
        return found, None, None
