"""Forward and backward passes: the hooks of a model, and when each unit's gradient leaves.

[Note: Hooks]
Parameters: a gradient has been accumulated. Modules of sharded units: before forward, the unit becomes whole; after
forward, it may go, and each output tensor gets a hook that makes the unit whole again before its backward pass. The
unit may go a second time when its last gradient has arrived: no node of its backward pass can still read a weight
then, except a frozen one, so units with frozen parameters wait for the gradients of their inputs instead.

[Note: Backward pass]
A pass opens with the first hook that fires and ends when autograd has finished, whoever called ``backward()``; each
pass is one micro-batch. A unit's gradient leaves as soon as its last parameter has one. What has not left by the
end of the pass (unused parameters) leaves then, zeros included: every unit is reduced exactly once per pass on every
rank, so ranks cannot disagree on what is communicated. At most two reductions are in flight, which bounds the memory
of leaves and receive buffers.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .units import Phase, Residency, Unit

_MAX_IN_FLIGHT = 2
_OPAQUE_OK = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Reducer:
    """See [Note: Backward pass].

    Args:
        units: All units; their order is the order of what is left at the end of a pass.
        on_end: Called when a pass is over.
    """

    def __init__(self, units: Sequence[Unit], on_end: Callable[[], None]) -> None:
        self._units = [unit for unit in units if unit.trained_params]
        self._on_end = on_end
        self._open = False
        self._arrived: Counter[Unit] = Counter()
        self._sent: set[Unit] = set()
        self._late: set[Unit] = set()  # had a gradient after they were sent; learned, they wait for the end
        self._in_flight: deque[Unit] = deque()
        self.sync = True
        self.num_passes = 0  # since the last reset

    @property
    def is_open(self) -> bool:
        """Whether a pass has begun and not ended."""
        return self._open

    def open(self) -> None:
        """Note that a backward pass is running; called by every hook that can come first."""
        if not self._open:
            self._open = True
            queue = cast(
                "Callable[[Callable[[], None]], None]", torch.autograd.Variable._execution_engine.queue_callback
            )
            queue(self._end)

    def arrive(self, unit: Unit) -> bool:
        """Count one parameter gradient of ``unit``; True when it was the last one."""
        self.open()
        self._arrived[unit] += 1
        if self.sync and unit in self._sent:
            self._late.add(unit)
        complete = self._arrived[unit] == len(unit.trained_params)
        if complete and self.sync and unit not in self._late:
            self.send(unit)
        return complete

    def send(self, unit: Unit) -> None:
        """Start to reduce ``unit``; first finish the oldest reduction if there are too many."""
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._in_flight.popleft().finish_reduce()
        unit.begin_reduce()
        self._in_flight.append(unit)
        self._sent.add(unit)

    def reset(self) -> None:
        """Forget an unfinished pass, and start to count passes anew."""
        self._finish_all()
        self._open = False
        self._arrived.clear()
        self._sent.clear()
        self.num_passes = 0

    def _end(self) -> None:
        self._finish_all()
        if self.sync:
            for unit in self._units:
                if unit not in self._sent or unit in self._late:
                    self.send(unit)
            self._finish_all()
        self._arrived.clear()
        self._sent.clear()
        self._open = False
        self.num_passes += 1
        self._on_end()

    def _finish_all(self) -> None:
        while self._in_flight:
            self._in_flight.popleft().finish_reduce()


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
