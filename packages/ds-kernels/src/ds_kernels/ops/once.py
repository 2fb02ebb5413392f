"""Second derivatives: no op has one, and whoever asks for one must hear of it.

Autograd takes the derivative of a backward pass from what it recorded of it. The kernels of a backward pass record
nothing, so that its results would pass for constants: gradients of a gradient penalty would be silently incomplete.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Barrier(torch.autograd.Function):
    """Hands tensors on; the backward pass through it is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name} can be differentiated once; got a backward pass through its backward pass, made with "
            "create_graph=True; compute this part with torch's own ops where second derivatives are needed"
        )


def differentiable_once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``backward`` such that going backward through its results raises.

    Args:
        name: Of the op, for the message.
        backward: ``(ctx, *grads)``, returns one gradient or None for each argument.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results: tuple[Tensor | None, ...] = backward(ctx, *grads)
        present = [result for result in results if result is not None]
        if not torch.is_grad_enabled() or not present:
            return results
        anchor = torch.empty(0, requires_grad=True)
        barred = iter(_Barrier.apply(name, anchor, *present))  # type: ignore[no-untyped-call] # torch's
        return tuple(None if result is None else next(barred) for result in results)

    return wrapped
