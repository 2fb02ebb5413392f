"""How an op is declared to torch: its schema, its shapes and its derivative, each once.

[Note: Ops]
An op is registered under the package's own name, so that a vendored copy does not meet the original. Its one
implementation asks the registry which kernel runs: on every device, for every data type, at every call; so what
``use_backend`` chose holds for compiled models, too. Importing ``ds_kernels.ops`` registers the ops, because
torch.compile must know them before it sees a call; nothing else happens then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import registry

NAMESPACE = __name__.removesuffix(".ops.declare").replace(".", "_")
"""Of the ops in ``torch.ops``."""


class Derivative(NamedTuple):
    """How autograd goes through an op."""

    save: Callable[..., None]  # setup_context(ctx, inputs, output)
    backward: Callable[..., Any]  # (ctx, *grads) -> one gradient or None for each argument


class Declarer:
    """Registers ops of one namespace; holds the registration."""

    def __init__(self, namespace: str) -> None:
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._namespace = namespace

    def __call__(
        self, name: str, schema: str, *, fake: Callable[..., Any], derivative: Derivative | None = None
    ) -> Callable[..., Any]:
        """Declare one op.

        Args:
            name: Of the op, the same as of its kernels.
            schema: In torch's schema language, without the name; the first argument is the tensor whose device and
                data type choose the kernel.
            fake: Returns empty tensors of the right shapes, data types and strides.
            derivative: None: the op has none.

        Returns:
            The op, to be called with the arguments of the schema.
        """
        qualified = f"{self._namespace}::{name}"
        self._library.define(f"{name}{schema}")
        self._library.impl(name, functools.partial(_run, name), "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=self._library)
        if derivative is not None:
            torch.library.register_autograd(
                qualified, derivative.backward, setup_context=derivative.save, lib=self._library
            )
        op: Callable[..., Any] = getattr(getattr(torch.ops, self._namespace), name).default
        return op


declare = Declarer(NAMESPACE)
"""Declares the ops of this package."""


def _run(name: str, first: Tensor, *args: Any) -> Any:
    return registry().kernel(name, first.device, first.dtype)(first, *args)
