"""What fused optimizers share: state in a codec, one kernel for each parameter, hyperparameters by group.

[Note: State]
The parameter's data type says how its master is kept: float32 is its own master; bfloat16 has an int16 tensor in the
state, ``master_low``, with which it is a float32 exactly (split), so that steps have the bits of float32 training.
``moments`` says how moments are kept: ``fp32`` as torch does, ``bf16``, or ``int8`` with a scale (``<name>_scale``)
for each 32 elements. With ``rounding``, bfloat16 parameters have no master, and they and bfloat16 moments are rounded
stochastically: see :class:`StochasticRounding`. A state tells by its data types how it was stored, so any is loaded
into any: see ``load_state_dict``. What the codecs keep is in ``backends/plain/state_codecs.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends.checks import NOTHING, Beside
from .registry import Lookup

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

    from .rounding import StochasticRounding

MOMENTS: Mapping[str, tuple[torch.dtype, torch.dtype]] = MappingProxyType(
    {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "int8": (torch.int8, torch.uint8),
    }
)
"""Data types of first and second moments, by the value of ``moments``."""

LOW = "master_low"
"""State of bfloat16 parameters: the 16 bits below them."""


class FusedOptimizer(torch.optim.Optimizer):
    """Base of optimizers whose step is one fused kernel for each parameter.

    A class names its op and its moments, and turns a parameter group into the numbers of a step (:meth:`hyper`).

    Args:
        params: Parameters, or parameter groups; float32, or bfloat16 with an exact float32 master (see [Note: State]).
        defaults: Settings of groups that do not name their own.
        moments: How moments are stored: ``fp32``, ``bf16`` or ``int8``.
        rounding: How bfloat16 parameters, then without a master, and bfloat16 moments are rounded; None keeps masters
            and rounds moments to nearest. int8 codes are always rounded to nearest.
        zero_grad: Set gradients to 0 in the pass that reads them.
        kernels: The backend to run on; None takes the process's choice at each step.

    Raises:
        ValueError: If a setting is out of its bounds.
    """

    op: ClassVar[str]
    """Name of the kernel."""
    moments: ClassVar[Mapping[str, int]]
    """Names of the state tensors in the order of the kernel's arguments, and whether each is a first (0) or second (1)
    moment."""
    counted: ClassVar[bool] = True
    """Whether the state has ``step``."""
    update_kind: ClassVar[str] = "elementwise"
    """What a new element depends on; read by partitioners."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        moments: str = "fp32",
        rounding: StochasticRounding | None = None,
        zero_grad: bool = False,
        kernels: KernelBackend | None = None,
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)}; got {moments!r}")
        self._codecs = MOMENTS[moments]
        self._rounding = rounding
        self._places: dict[Tensor, tuple[int, int]] = {}
        self.counts_steps = self.counted or rounding is not None
        self.zeroes_grads = zero_grad
        self._kernels = kernels
        super().__init__(params, {**defaults, "update_kind": self.update_kind})

    # What a class says #

    def check(self, group: Mapping[str, Any]) -> None:
        """Check the settings of a group; raise ValueError if one is out of its bounds."""
        raise NotImplementedError

    def hyper(self, group: Mapping[str, Any], step: int, scale: float, *, zero_grad: bool) -> Any:
        """Return the numbers of a step; ``step`` counts from 1, or is 2 after the first where steps are not counted."""
        raise NotImplementedError

    def stored(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the moments that a group has."""
        return tuple(self.moments)

    def initial(self, group: Mapping[str, Any]) -> float:
        """Return the value of moments before the first step."""
        return 0.0

    def dtype_of(self, name: str, param: Tensor) -> torch.dtype:
        """Return the data type in which the moment ``name`` of ``param`` is stored."""
        return self._codecs[self.moments[name]]

    def apply(self, kernels: Kernels, param: Tensor, grad: Tensor, state: StateOfParam, hyper: Any) -> None:
        """Run the kernel of one parameter's step."""
        kernel = kernels(state.op(self.op), param)
        kernel(param, grad, *state.moments, copy=state.copy, hyper=hyper, **state.beside)

    # Steps #

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in ``torch.optim``.

        Raises:
            ValueError: If a setting is out of its bounds.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            self._places[param] = len(self._places), 0

    def place(self, param: Tensor, number: int, first: int) -> None:
        """Say that ``param`` holds the elements from ``first`` on of a whole parameter, for stochastic rounding.

        Then the parts have the bits of the whole, whatever the parts are. Without it, ``number`` counts the parameters
        of this optimizer, and ``first`` is 0.

        Args:
            param: One of this optimizer's parameters.
            number: Tells the whole parameter from others.
            first: Index of the first element.

        Raises:
            ValueError: If ``param`` is not of this optimizer, or ``first`` is negative.
        """
        if param not in self._places or first < 0:
            raise ValueError(
                f"a parameter of this optimizer starts at an index of at least 0; got {first} for one of shape "
                f"{tuple(param.shape)}, {'known' if param in self._places else 'not known'} here"
            )
        self._places[param] = number, first

    def keys_of(self, param: Tensor, names: Sequence[str], step: int) -> Mapping[str, Tensor]:
        """Return the keys by which step ``step`` rounds, under ``param`` and the moments' names."""
        if self._rounding is None:
            return NOTHING.keys
        number, first = self._places[param]
        arrays = {"param": param, **{name: self.state[param][name] for name in names}}
        return {
            name: self._rounding.key(number, index, step, first=first)
            for index, (name, array) in enumerate(arrays.items())
            if array.dtype == torch.bfloat16
        }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step once over all parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            ValueError: If a parameter is not contiguous float32 or bfloat16, or not on a device the backend serves.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kernels = Kernels(self._kernels)
        for group in self.param_groups:
            group_step = GroupStep(self, group, scale=1.0, kernels=kernels)
            for param in group["params"]:
                if param.grad is not None:
                    group_step.run(param, param.grad)
        return loss

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of ``param`` before its first step."""
        state = {"step": torch.tensor(0.0, dtype=torch.float32)} if self.counts_steps else {}
        for name in self.stored(group):
            state |= self._encoded(name, param, torch.full_like(param, self.initial(group), dtype=torch.float32))
        if self._has_low(param):
            state[LOW] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def _has_low(self, param: Tensor) -> bool:
        return param.dtype == torch.bfloat16 and self._rounding is None

    def _encoded(self, name: str, param: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Return ``value`` as this optimizer stores the moment ``name``, in tensors of its own."""
        from .backends.plain import state_codecs

        dtype = self.dtype_of(name, param)
        stored = torch.empty_like(param, dtype=dtype)
        if dtype.is_floating_point:
            stored.copy_(value)
            return {name: stored}
        scale = torch.empty(state_codecs.num_scales(param.numel()), dtype=torch.bfloat16, device=param.device)
        state_codecs.encode_like(value.to(param.device), stored, scale)
        return {name: stored, f"{name}_scale": scale}

    # Masters #

    def master(self, param: Tensor) -> Tensor:
        """Return the float32 value of ``param``; of a float32 parameter a view."""
        from .backends.plain import state_codecs

        return state_codecs.decode(param.detach(), self.state[param].get(LOW) if param in self.state else None)

    @torch.no_grad()
    def set_master(self, param: Tensor, value: Tensor) -> None:
        """Set ``param`` to the float32 ``value``, exactly: a bfloat16 parameter gets the lower half into its state.

        Without a master, it is rounded to nearest.
        """
        from .backends.plain import state_codecs

        if not self._has_low(param):
            param.copy_(value)
            return
        low = self.state[param].setdefault(LOW, torch.zeros_like(param, dtype=torch.int16))
        state_codecs.encode_like(value.to(param.device, torch.float32), param, low)

    # State dicts #

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class in any codec, or of torch's class of this optimizer.

        Moments are decoded and encoded anew where the codecs differ, and copied where they do not. ``master_low``
        completes bfloat16 parameters; without it in the state (it came from float32 training) it is 0 until
        :meth:`set_master`, and with ``rounding`` it is dropped; where parameters are float32, they must hold the
        bfloat16 weights it belongs to, and become the exact masters.

        Args:
            state_dict: As ``state_dict()`` returned it; load the model's weights first.

        Raises:
            ValueError: If groups do not fit, a variant is not offered, or ``master_low`` belongs to other weights.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = state_dict["state"]
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for group in self.param_groups:
            for param, number in zip(group["params"], numbers):
                if number in saved:
                    self.state[param] = self._adopted(param, group, saved[number])

    @torch.no_grad()
    def _adopted(self, param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Tensor]:
        from .backends.plain import state_codecs

        state: dict[str, Tensor] = {}
        if self.counts_steps:
            step = saved["step"] if self.counted else saved.get("step", 1.0)
            state["step"] = torch.as_tensor(step, dtype=torch.float32).to("cpu", copy=True)
        for name in self.stored(group):
            if saved.get(name) is None:  # torch's SGD before its first step
                continue
            scale = saved.get(f"{name}_scale")
            if saved[name].dtype == self.dtype_of(name, param):
                state[name] = saved[name].to(param.device, copy=True).view(param.shape)
                if scale is not None:
                    state[f"{name}_scale"] = scale.to(param.device, copy=True)
            else:
                state |= self._encoded(name, param, state_codecs.decode(saved[name], scale).view(param.shape))
        low = saved.get(LOW)
        if self._has_low(param):
            state[LOW] = torch.zeros_like(param, dtype=torch.int16) if low is None else low.to(param.device, copy=True)
        elif low is not None and param.dtype == torch.float32:
            high = param.bfloat16()
            if not torch.equal(high.float(), param):
                raise ValueError(
                    f"{LOW} completes bfloat16 weights, so float32 parameters must hold these; got a parameter of "
                    f"shape {tuple(param.shape)} with more digits; load the weights of the same checkpoint first"
                )
            param.copy_(state_codecs.join(high, low.to(param.device)))
        return state

    def __getstate__(self) -> dict[str, Any]:
        # The base class keeps only what a state_dict holds; a copied optimizer needs its backend and codecs, too.
        names = ("_kernels", "_codecs", "_rounding", "_places", "counts_steps", "zeroes_grads")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{name} must be false, it is not offered; got True; use torch.optim")
            # A state_dict of torch's lacks our own settings.
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group["update_kind"] = self.update_kind


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
        optimizer.apply(self._kernels, param, grad, StateOfParam(state, self._names, copy, keys), hyper)
        if optimizer.counts_steps:
            state["step"].fill_(step)
