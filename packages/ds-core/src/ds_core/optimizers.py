"""Optimizers of ``torch.optim`` and of the caller, as makers that a partitioner can use.

Whether an optimizer may run on shards of parameters is declared by its parameter groups (key ``update_kind``) and read
by the partitioner; classes of torch are known to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ._json import is_quoted
from .registry import did_you_mean

if TYPE_CHECKING:
    from .protocols import BuildContext, Json, ParamGroups

OptimizerType: TypeAlias = Callable[..., torch.optim.Optimizer]

REFUSED: Mapping[str, str] = {
    "LBFGS": "evaluates the loss several times in one step",
    "SparseAdam": "takes sparse gradients, and gradients are dense buffers here",
}
"""Classes of ``torch.optim`` that cannot be used, each with the reason."""

OF_COMM = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")
"""Optimizers that ds-comm has."""

PLUGIN_NAMES = ("Lamb", "Lars", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD", *OF_COMM)
"""Names that DeepSpeed's files write in any case, beside torch's own, and that a plugin can offer."""

# Settings of DeepSpeed's Adam that torch's lacks, each with the values under which the two agree.
_ADAM_ONLY: Mapping[str, tuple[bool, ...]] = {
    "bias_correction": (True,),
    "fp32_optimizer_states": (True,),
    "set_grad_none": (True, False),
}


# By name #


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchOptimizer:
    """A class of ``torch.optim`` with its settings, in the shape of a plugin.

    Example:
        >>> TorchOptimizer(kind=torch.optim.SGD, settings={"lr": 0.1}).name
        'torch.optim.SGD'
    """

    kind: OptimizerType
    """The class."""
    settings: Mapping[str, Any]
    """What it is constructed with, besides the parameters."""
    role_version: int = 1
    """Version of the role it is written for."""
    config_type: None = None
    """It has no settings that are not in ``settings``."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"torch.optim.{self.kind.__name__}"

    def build(self, config: None, context: BuildContext) -> TorchMaker:
        """Return the maker."""
        return TorchMaker(kind=self.kind, settings=self.settings)


def canonical_name(name: str) -> str:
    """Return an optimizer's name spelled as its class is, where DeepSpeed ignores case.

    Example:
        >>> canonical_name("adamw"), canonical_name("Shampoo")
        ('AdamW', 'Shampoo')
    """
    known = (*_torch_classes(), *REFUSED, *PLUGIN_NAMES)
    return {each.casefold(): each for each in known}.get(name.casefold(), name)


def torch_optimizer(name: str, params: Mapping[str, Json], plugins: Iterable[str] = ()) -> TorchOptimizer:
    """Find a class of ``torch.optim`` by name and check its settings.

    ``Adam`` follows DeepSpeed: it is AdamW unless ``adam_w_mode`` is false. Where DeepSpeed would run its
    own Adam (no ``torch_adam``), weight decay defaults to that one's 0, not to torch's 0.01.

    Args:
        name: Name of the class, in any case.
        params: ``optimizer.params`` of the configuration.
        plugins: Names of installed optimizer plugins, for the error message.

    Returns:
        The class and its settings.

    Raises:
        ValueError: If there is no such class, it cannot be used, or it refuses a setting.
    """
    name = canonical_name(name)
    kinds = _torch_classes()
    if name in REFUSED:
        raise ValueError(
            f"optimizer.type = {name!r} cannot be used, because it {REFUSED[name]}; use one of: {', '.join(kinds)}"
        )
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in params.items()
    }
    if name in ("Adam", "AdamW"):
        name, settings = _adopt_adam(name, settings)
    if name not in kinds:
        known = name in PLUGIN_NAMES
        what = "is known, but not provided here: it is neither" if known else "is neither"
        if name in OF_COMM:
            what = "is known, but not provided here: 'pip install ds-comm' does; it is neither"
        raise ValueError(
            f"optimizer.type = {name!r} {what} an installed plugin ({', '.join(plugins) or 'none installed'}) nor one "
            f"of torch's: {', '.join(kinds)}{'' if known else did_you_mean(name, (*plugins, *kinds))}"
        )
    _check_settings(name, kinds[name], settings)
    return TorchOptimizer(kind=kinds[name], settings=settings)


def _adopt_adam(name: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of torch's class that does what DeepSpeed's Adam would."""
    for key, values in _ADAM_ONLY.items():
        if settings.get(key, values[0]) not in values:
            raise ValueError(
                f"optimizer.params.{key} = {settings[key]!r}: torch's {name} has {values[0]} only; remove the key"
            )
    own = {key: value for key, value in settings.items() if key not in _ADAM_ONLY}
    if not own.pop("torch_adam", False):
        own.setdefault("weight_decay", 0.0)
    return ("AdamW" if own.pop("adam_w_mode", True) else name), own


def _check_settings(name: str, kind: OptimizerType, settings: Mapping[str, Any]) -> None:
    known = [each for each in inspect.signature(kind).parameters if each != "params"]
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f"optimizer.params.{key} = {value!r} is no setting of "
                f"torch.optim.{name}{did_you_mean(key, known)}; it has: {', '.join(known)}"
            )
    try:
        kind([torch.zeros(1, 1)], **settings)
    except (TypeError, ValueError) as error:
        quoted = [f"; write {key} without quotes" for key, value in settings.items() if is_quoted(value)]
        raise ValueError(
            f"optimizer.params = {settings}: torch.optim.{name} refuses it: {error}{''.join(quoted)}"
        ) from error


# Makers #


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchMaker:
    """Makes an optimizer of a ``torch.optim`` class.

    Example:
        >>> maker = TorchMaker(kind=torch.optim.SGD, settings={"lr": 0.1})
        >>> maker.make([{"params": [torch.zeros(2)]}]).param_groups[0]["lr"]
        0.1
    """

    kind: OptimizerType
    """The class."""
    settings: Mapping[str, Any]
    """What it is constructed with; a parameter group's own settings win."""
    update: None = None
    """The partitioner runs ``optimizer.step()`` itself: torch has no pass that also scales and copies."""

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return an optimizer over ``groups``."""
        return self.kind(groups, **self.settings)


class ClientMaker:
    """Hands out an optimizer object that the caller made, after pointing it at the shards.

    The object stays the same one, and so do its ``param_groups`` dictionaries, because learning rate
    schedulers of the caller hold on to them.

    Args:
        optimizer: The caller's optimizer, before its first step.

    Raises:
        ValueError: If the class cannot be used, or if it already holds state.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(2, 2)], lr=0.1)
        >>> maker = ClientMaker(optimizer)
        >>> maker.make([{"params": [torch.zeros(4)]}]) is optimizer
        True
    """

    update: None = None  # The partitioner runs optimizer.step() itself.

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        for name in REFUSED:
            if isinstance(optimizer, vars(torch.optim)[name]):
                raise ValueError(
                    f"the optimizer passed in is a {type(optimizer).__qualname__}, which {REFUSED[name]}; use another "
                    f"one, for example one of: {', '.join(_torch_classes())}"
                )
        if optimizer.state:
            raise ValueError(
                f"the optimizer passed in already holds state of {len(optimizer.state)} parameters, which "
                "would be lost; pass it before its first step, and load its state from a checkpoint "
                "afterwards"
            )
        self._optimizer = optimizer

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return the caller's optimizer, its parameter groups pointing at ``groups``' parameters.

        Raises:
            ValueError: If there are more or fewer groups than the optimizer has.
        """
        own = self._optimizer.param_groups
        if len(own) != len(groups):
            raise ValueError(
                f"the optimizer passed in has {len(own)} parameter groups, the partitioned model has "
                f"{len(groups)}; make it over the same model, and add no groups afterwards"
            )
        for mine, group in zip(own, groups):
            mine["params"] = group["params"]
        return self._optimizer


def _torch_classes() -> dict[str, OptimizerType]:
    """Return the classes of ``torch.optim`` that can be used, by name."""
    found = ((name, kind) for name, kind in sorted(vars(torch.optim).items()) if inspect.isclass(kind))
    return {
        name: kind
        for name, kind in found
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer and name not in REFUSED
    }
