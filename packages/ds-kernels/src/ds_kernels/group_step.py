"""One step over the parameters of a group: which kernel, and with what beside parameter and gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends.checks import NOTHING, Beside
from .parameters import in_memory_order, ordered_like
from .registry import Lookup

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

    from .fused import FusedOptimizer

LOW = "master_low"
"""State of bfloat16 parameters: the 16 bits below them."""


class Kernels:
    """The kernels of a step, each found once.

    Args:
        first: A backend that comes before the process's choice.
    """

    def __init__(self, first: KernelBackend | None) -> None:
        self._first = first
        self._lookups: dict[str, Lookup] = {}

    def __call__(self, op: str, param: Tensor) -> Callable[..., Any]:
        """Return the kernel of ``op`` for ``param``."""
        lookup = self._lookups.get(op)
        if lookup is None:
            lookup = self._lookups[op] = Lookup(op, self._first)
        return lookup[param.device, param.dtype]


class StateOfParam:
    """What a kernel takes beside parameter and gradient.

    Args:
        state: The optimizer's state of the parameter.
        names: Of its moments.
        copy: Copy to refresh from the new parameter, or None.
        keys: By which bfloat16 arrays are rounded stochastically.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        names: Sequence[str],
        copy: Tensor | None,
        keys: Mapping[str, Tensor] = NOTHING.keys,
    ) -> None:
        self.moments = [state[name] for name in names]
        self.copy = copy
        scales = {name: state[f"{name}_scale"] for name in names if f"{name}_scale" in state}
        beside = Beside(state.get(LOW), scales, keys) if scales or keys or LOW in state else NOTHING
        self._coded = beside is not NOTHING or any(moment.dtype != torch.float32 for moment in self.moments)
        self.beside = {"beside": beside} if self._coded else {}
        self._rounded = bool(keys)

    def op(self, name: str) -> str:
        """Return the op for this state: backends that know float32 only need not know of codecs, nor of rounding."""
        return f"rounded_{name}" if self._rounded else f"coded_{name}" if self._coded else name


class GroupStep:
    """One step over the parameters of one group.

    Args:
        optimizer: Holds the state of each parameter, under the parameter.
        group: One of ``optimizer.param_groups``.
        scale: Factor on the gradients.
        kernels: The kernels to step with.
    """

    def __init__(self, optimizer: FusedOptimizer, group: dict[str, Any], *, scale: float, kernels: Kernels) -> None:
        self._optimizer = optimizer
        self._group = group
        self._scale = scale
        self._kernels = kernels
        self._names = optimizer.stored(group)
        self._hypers: dict[int, Any] = {}  # by step: nearly always one

    def run(self, param: Tensor, grad: Tensor, copy: Tensor | None = None) -> None:
        """Step ``param``, making its state if this is its first, and refresh ``copy``."""
        optimizer = self._optimizer
        state = optimizer.state[param]
        first = not state or any(name not in state for name in self._names)
        if first:
            state |= {**optimizer.init_state(param, self._group), **state}
        step = int(state["step"].item()) + 1 if optimizer.counts_steps else 1 if first else 2
        hyper = self._hypers.get(step)
        if hyper is None:
            hyper = optimizer.hyper(self._group, step, self._scale, zero_grad=optimizer.zeroes_grads)
            self._hypers[step] = hyper
        keys = optimizer.keys_of(param, self._names, step)
        if param.is_contiguous() and grad.is_contiguous():
            optimizer.apply(self._kernels, param, grad, StateOfParam(state, self._names, copy, keys), hyper)
        else:
            arrays = {name: in_memory_order(t) if t.shape == param.shape else t for name, t in state.items()}
            ordered = ordered_like(grad, param)
            flat = in_memory_order(param), in_memory_order(ordered)
            refreshed = None if copy is None else in_memory_order(copy)
            optimizer.apply(self._kernels, *flat, StateOfParam(arrays, self._names, refreshed, keys), hyper)
            if ordered is not grad and optimizer.zeroes_grads:
                grad.zero_()
        if optimizer.counts_steps:
            state["step"].fill_(step)
