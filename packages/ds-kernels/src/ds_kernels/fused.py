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

from .backends.checks import NOTHING
from .group_step import LOW, GroupStep, Kernels, StateOfParam
from .parameters import check_gradient, check_parameter, in_memory_order, is_final, ordered_like, places
from .saved_state import SavedState, check_keys, coded_names, torchs_state
from .storage import check_storage

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
        others: None; here to say of torch's arguments that are not offered what to do.

    Raises:
        TypeError: If an argument is not offered, or a name stands for an object.
        ValueError: If a setting is out of its bounds, or a parameter cannot be stepped.
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
        **others: Any,
    ) -> None:
        check_storage(type(self).__name__, moments, tuple(MOMENTS), rounding=rounding, kernels=kernels, others=others)
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
            ValueError: If a setting is out of its bounds, or a parameter can never be stepped. Float16 is refused at
                the first step, before anything moves: a partitioner may put float32 masters in the place of such.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for place in places(self.param_groups, len(self.param_groups) - 1):
                if is_final(place.param):
                    check_parameter(place)
        except ValueError:
            self.param_groups.pop()
            raise
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
        """Step once over all parameters that have a gradient; where one cannot be stepped, none is.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            ValueError: If a parameter or its gradient cannot be stepped; see [Note: Memory] in ``parameters.py``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place in places(self.param_groups):
            if place.param.grad is not None:
                check_parameter(place)
                check_gradient(place, place.param.grad)
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
        ordered = ordered_like(value.to(param.device), param)
        state_codecs.encode_like(in_memory_order(ordered), in_memory_order(stored), scale)
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

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups, as in ``torch.optim``; see [Note: Saved states] in ``saved_state.py``.

        Float32 state loads into torch's class, too. Coded state has other names there, so that torch's class fails at
        its first step instead of taking codes for numbers: :meth:`torch_state_dict` decodes it.
        """
        saved = super().state_dict()
        return {**saved, "state": {key: coded_names(state, self.moments) for key, state in saved["state"].items()}}

    @torch.no_grad()
    def torch_state_dict(self) -> dict[str, Any]:
        """Return a ``state_dict`` for torch's class of this optimizer: moments decoded to float32, in new memory.

        A bfloat16 parameter's master is not in it: make torch's optimizer over float32 parameters, and set them to
        :meth:`master`.

        Example:
            >>> from .optim import FusedAdam
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = FusedAdam([weight], moments="int8")
            >>> weight.grad = torch.ones(2)
            >>> optimizer.step()
            >>> torch.optim.AdamW([weight]).load_state_dict(optimizer.torch_state_dict())
        """
        saved = super().state_dict()
        return {**saved, "state": {key: torchs_state(state, self.moments) for key, state in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class in any codec, or of torch's class of this optimizer.

        Moments are decoded and encoded anew where the codecs differ, and copied where they do not. ``master_low``
        completes bfloat16 parameters; without it in the state (it came from float32 training) it is 0 until
        :meth:`set_master`, and with ``rounding`` it is dropped; where parameters are float32, they must hold the
        bfloat16 weights it belongs to, and become the exact masters.

        Args:
            state_dict: As ``state_dict()`` returned it; load the model's weights first.

        Raises:
            ValueError: If groups do not fit, a variant is not offered, the state is of another class or of parameters
                of other sizes, or ``master_low`` belongs to other weights.
        """
        saved = state_dict["state"]
        numbers = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        kind = type(self).__name__
        for place, number in zip(places(self.param_groups), numbers):
            check_keys(kind, place, saved.get(number, {}), self.moments, counted=self.counted)
        super().load_state_dict({**state_dict, "state": {}})
        for place, number in zip(places(self.param_groups), numbers):
            if number in saved:
                group = self.param_groups[place.group]
                self.state[place.param] = self._adopted(place.param, group, SavedState(saved[number]))

    @torch.no_grad()
    def _adopted(self, param: Tensor, group: Mapping[str, Any], saved: SavedState) -> dict[str, Tensor]:
        from .backends.plain import state_codecs

        state: dict[str, Tensor] = {}
        if self.counts_steps:
            state["step"] = torch.as_tensor(saved.step(), dtype=torch.float32).to("cpu", copy=True)
        for name in self.stored(group):
            moment = saved.moment(name)
            if moment is None:  # torch's SGD before its first step
                continue
            if moment.stored.dtype == self.dtype_of(name, param) and moment.fits(param):
                state |= moment.copied(name, param)
            else:
                state |= self._encoded(name, param, moment.decoded().view(param.shape))
        low = saved.low()
        if self._has_low(param):
            state[LOW] = torch.zeros_like(param, dtype=torch.int16)
            if low is not None:
                state[LOW].copy_(low.view(param.shape))
        elif low is not None and param.dtype == torch.float32:
            high = param.bfloat16()
            if not torch.equal(high.float(), param):
                raise ValueError(
                    f"{LOW} completes bfloat16 weights, so float32 parameters must hold these; got a parameter of "
                    f"shape {tuple(param.shape)} with more digits; load the weights of the same checkpoint first"
                )
            param.copy_(state_codecs.join(high, low.to(param.device).view(param.shape)))
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
