"""The hooks that turn a model's forward and backward pass into calls on units.

[Note: Hooks]
Parameters: a gradient has been accumulated. Modules of sharded units: before forward, the unit becomes whole; after
forward, it may go, and each output tensor gets a hook that makes the unit whole again before its backward pass. The
unit may go a second time when its last gradient has arrived: no node of its backward pass can still read a weight
then, except a frozen one, so units with frozen parameters wait for the gradients of their inputs instead.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .reducer import Reducer
from .residency import Phase, Residency
from .unit import Unit

_OPAQUE_OK = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Hooks:
    """See [Note: Hooks].

    Args:
        residency: Brings sharded units in.
        reducer: Sends gradients.
    """

    def __init__(self, residency: Residency, reducer: Reducer) -> None:
        self._residency = residency
        self._reducer = reducer
        self._waiting_for_inputs: set[Unit] = set()

    def install(self, unit: Unit, *, sharded: bool) -> None:
        """Install the hooks of ``unit``."""
        for param in unit.trained_params:
            param.register_post_accumulate_grad_hook(_weakly(self, unit))
        if sharded:
            for module in unit.modules:
                module.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True, prepend=True)
                module.register_forward_hook(partial(self._after_forward, unit))

    def guard(self, model: nn.Module) -> None:
        """Refuse a forward pass after a backward pass that was cut off."""
        model.register_forward_pre_hook(self._check_last_pass, prepend=True)

    # Forward #

    def _check_last_pass(self, _module: nn.Module, _args: Any) -> None:
        if self._reducer.is_open and not _in_backward():
            raise RuntimeError(
                "the last backward pass did not finish (did it raise?), so some gradients of its micro-batch are "
                "summed and others are not: drop all gradients since the last step with step(None), on every rank"
            )

    def _before_forward(self, unit: Unit, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._residency.need(unit, Phase.BACKWARD if _in_backward() else Phase.FORWARD)
        if unit.has_frozen and torch.is_grad_enabled():
            inputs = [t for t in _tensors((args, kwargs), unit.name) if t.requires_grad]
            if inputs:
                self._waiting_for_inputs.add(unit)
                torch.autograd.graph.register_multi_grad_hook(inputs, partial(self._after_inputs, unit))

    def _after_forward(self, unit: Unit, _module: nn.Module, _args: Any, output: Any) -> None:
        if not _in_backward():
            # within a backward pass this is a recomputation: the backward pass of the unit follows at once
            self._residency.idle(unit)
        if torch.is_grad_enabled():
            before_backward = partial(self._before_backward, unit)
            for tensor in _tensors(output, unit.name):
                if tensor.requires_grad:
                    tensor.register_hook(before_backward)

    # Backward #

    def _before_backward(self, unit: Unit, _grad: Tensor) -> None:
        if not self._reducer.is_open:
            self._residency.end_pass(Phase.FORWARD)
        self._reducer.open()
        self._residency.need(unit, Phase.BACKWARD)

    def after_gradient(self, unit: Unit) -> None:
        """Note that one parameter of ``unit`` has its gradient."""
        if self._reducer.arrive(unit) and unit not in self._waiting_for_inputs:
            self._residency.idle(unit)

    def _after_inputs(self, unit: Unit, _grads: Any) -> None:
        self._waiting_for_inputs.discard(unit)
        self._residency.idle(unit)


def _weakly(hooks: Hooks, unit: Unit) -> Callable[[Tensor], None]:
    """Return a parameter's hook that keeps neither alive.

    The garbage collector does not see through these hooks (torch holds them in C++), so a strong reference would
    close a cycle, parameter to hook to unit to parameter, and no partitioned model would ever be freed.
    """
    hooks_ref, unit_ref = weakref.ref(hooks), weakref.ref(unit)

    def after_gradient(_param: Tensor) -> None:
        alive_hooks, alive_unit = hooks_ref(), unit_ref()
        if alive_hooks is not None and alive_unit is not None:
            alive_hooks.after_gradient(alive_unit)

    return after_gradient


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(value: Any, unit: str) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts, registered pytrees and dataclasses."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name), unit)
        elif not isinstance(leaf, _OPAQUE_OK):
            raise NotImplementedError(
                f"unit {unit!r} takes or returns a {type(leaf).__qualname__}: tensors inside it cannot be found, and "
                "sharded parameters could be missing in the backward pass. Return tensors, tuples, lists, dicts or "
                "dataclasses, or register the type with torch.utils._pytree.register_pytree_node"
            )
