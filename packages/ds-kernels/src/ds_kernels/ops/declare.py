"""How an op is declared to torch: its schema, its shapes and its derivative, each once.

[Note: Ops]
An op is registered under the package's own name, so that a vendored copy does not meet the original. Its one
implementation asks the registry which kernel runs: on every device, for every data type, at every call; so what
``use_backend`` chose holds for compiled models, too. Importing ``ds_kernels.ops`` registers the ops, because
torch.compile must know them before it sees a call; nothing else happens then. All tensors of a call are on one device;
that is checked here, since torch picks a kernel by any one of them and would run it on the memory of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import registry
from .autocast import no_autocast
from .once import differentiable_once

NAMESPACE = __name__.removesuffix(".ops.declare").replace(".", "_")
"""Of the ops in ``torch.ops``."""


class Derivative(NamedTuple):
    """How autograd goes through an op."""

    save: Callable[..., None]  # setup_context(ctx, inputs, output)
    backward: Callable[..., Any]  # (ctx, *grads) -> one gradient or None for each argument; once


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
        names = [argument.split()[-1] for argument in schema[1 : schema.index(")")].split(", ")]
        run = functools.partial(_on_one_device, functools.partial(_run, name), name, names)
        self._library.impl(name, run, "CompositeExplicitAutograd")
        fake = functools.partial(_on_one_device, fake, name, names)
        torch.library.register_fake(qualified, fake, lib=self._library)
        if derivative is not None:
            backward = differentiable_once(name, derivative.backward)
            torch.library.register_autograd(qualified, backward, setup_context=derivative.save, lib=self._library)
        op: Callable[..., Any] = getattr(getattr(torch.ops, self._namespace), name).default
        return op


declare = Declarer(NAMESPACE)
"""Declares the ops of this package."""


def _on_one_device(kernel: Callable[..., Any], op: str, names: Sequence[str], first: Tensor, *args: Any) -> Any:
    for name, tensor in zip(names[1:], args):
        if isinstance(tensor, Tensor) and tensor.device != first.device:
            raise ValueError(
                f"all tensors of {op} must be on one device; got {names[0]} on {first.device} and {name} on "
                f"{tensor.device}; move them with .to()"
            )
    return kernel(first, *args)


def _run(name: str, first: Tensor, *args: Any) -> Any:
    with no_autocast(first.device.type):
        return registry().kernel(name, first.device, first.dtype)(first, *args)
