"""What the update of one element depends on: declared for each parameter group of an optimizer.

[Note: Kinds of optimizers]
Gradients and parameters are cut into shards anywhere; whether an optimizer may run on what is left is a property of
its formula that no test can see, so it is declared. Each parameter group has the key ``update_kind``: an optimizer
puts it into its ``defaults``, or sets it group by group, or the caller adds it to a group. Classes of ``torch.optim``
are known. A group that says nothing is stepped as whole tensors, which is right for every optimizer that treats each
tensor on its own.

==============  ==========================================================  =========================================
``update_kind``  a new element depends on                                    the optimizer's parameters are
==============  ==========================================================  =========================================
elementwise     its own gradient and state                                  one flat shard per buffer and group
statistics      also on sums of squares over its tensor, which the           the part of each tensor in the shard
                optimizer takes from what ``share_sums`` was given
tensor          its whole tensor                                            whole tensors that this rank owns
matrix          likewise, at the cost of products of matrices               likewise
==============  ==========================================================  =========================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from ds_core.protocols import ParamGroups

logger = logging.getLogger(__package__)

KEY = "update_kind"
"""Key of a parameter group that holds the declaration."""

EXCHANGES = "exchanges"
"""Key of the groups of an optimizer that exchanges messages itself; see [Note: Steps by own gradients]."""

ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Classes of torch that treat each element on its own."""

_TENSOR = ("Adafactor",)  # classes of torch that treat each tensor on its own
_MATRIX = ("Muon",)
_REFUSED = {
    "LBFGS": "evaluates the loss several times in one step",
    "SparseAdam": "takes sparse gradients, and gradients are dense buffers here",
}


class UpdateKind(Enum):
    """See [Note: Kinds of optimizers]."""

    ELEMENTWISE = "elementwise"
    STATISTICS = "statistics"
    TENSOR = "tensor"
    MATRIX = "matrix"

    @property
    def whole(self) -> bool:
        """Whether one rank steps whole tensors."""
        return self in (UpdateKind.TENSOR, UpdateKind.MATRIX)

    @property
    def per_tensor(self) -> bool:
        """Whether no parameter of the optimizer holds elements of two tensors."""
        return self is not UpdateKind.ELEMENTWISE

    def cost(self, shape: torch.Size) -> int:
        """Return what a step of a tensor costs, in any unit: elements, for matrices times the shorter side."""
        numel = shape.numel()
        if self is not UpdateKind.MATRIX or len(shape) < 2:
            return numel
        return numel * min(shape[0], numel // max(shape[0], 1))


class Arranged(NamedTuple):
    """What an optimizer makes of parameter groups."""

    groups: ParamGroups  # over the model's parameters, with the settings of the optimizer
    kinds: list[UpdateKind]  # of each group
    optimizer: str = "none"  # its class
    exchanges: bool = False  # whether it exchanges messages itself


def arrange(
    groups: ParamGroups,
    names: Mapping[nn.Parameter, str],
    make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
) -> Arranged:
    """Find out how an optimizer wants parameters to be grouped and cut, before anything is cut.

    ``make_optimizer`` is called once on stand-ins: parameters of the real shapes and marks that take the memory of
    one element each. Groups carry ``param_names``, as torch's do that are made from ``named_parameters()``.

    Args:
        groups: Over the model's parameters.
        names: The model's parameters with their names; all of them, where a parameter has several.
        make_optimizer: Makes the optimizer.

    Returns:
        The groups of the optimizer that was made, over the model's parameters again.

    Raises:
        ValueError: A declaration is none of the four kinds, or not one that the optimizer can follow, or the optimizer
            cannot run on partitioned parameters, or was made over others.
        TypeError: ``make_optimizer`` is no function, or returns no optimizer.
    """
    _check_maker(make_optimizer)
    originals = {_stand_in(param): param for entry in groups for param in entry["params"]}
    stand_ins = {param: stand_in for stand_in, param in originals.items()}
    probe = make_optimizer([_named(entry, names, stand_ins) for entry in groups])
    _check_made(probe, originals)
    own = [{key: value for key, value in entry.items() if key != "param_names"} for entry in probe.param_groups]
    kinds = _kinds(type(probe), own)
    _check_statistics(probe, kinds)
    arranged = [{**entry, "params": [originals[p] for p in entry["params"]]} for entry in own]
    name = f"{type(probe).__module__}.{type(probe).__qualname__}"
    return Arranged(arranged, kinds, name, any(group.get(EXCHANGES) for group in own))


def _check_maker(make_optimizer: object) -> None:
    if not callable(make_optimizer):
        kind = type(make_optimizer).__name__
        raise TypeError(
            f"make_optimizer is a function that makes the optimizer over what it is given; got an object, a {kind}; "
            f"pass for example lambda groups: {kind}(groups, lr=...)"
        )


def _check_made(probe: object, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> None:
    if not isinstance(probe, torch.optim.Optimizer):
        raise TypeError(f"make_optimizer returns a torch.optim.Optimizer; got {probe!r}")
    if any(param not in stand_ins for entry in probe.param_groups for param in entry["params"]):
        raise ValueError(
            "make_optimizer made an optimizer over other parameters than those it was given; make it over its "
            "argument, for example lambda groups: torch.optim.AdamW(groups), not over model.parameters()"
        )


def _named(
    entry: Mapping[str, Any], names: Mapping[nn.Parameter, str], stand_ins: Mapping[nn.Parameter, nn.Parameter]
) -> dict[str, Any]:
    params: list[nn.Parameter] = entry["params"]
    return {**entry, "params": [stand_ins[p] for p in params], "param_names": [names[p] for p in params]}


def _stand_in(param: nn.Parameter) -> nn.Parameter:
    device = torch.device("cpu") if param.is_meta else param.device
    stand_in = nn.Parameter(torch.zeros((), device=device).expand(param.shape))
    vars(stand_in).update(vars(param))  # marks that an optimizer may read, such as use_muon
    return stand_in


def _kinds(optimizer: type[torch.optim.Optimizer], groups: Sequence[Mapping[str, Any]]) -> list[UpdateKind]:
    for name, reason in _REFUSED.items():
        if issubclass(optimizer, vars(torch.optim)[name]):
            raise ValueError(f"{optimizer.__name__} cannot step partitioned parameters: it {reason}; use another one")
    known = _known(optimizer)
    if known is None and any(KEY not in group for group in groups):
        logger.info(
            "%s.%s does not declare %r: one rank steps each tensor whole, which is right if tensors are treated one by "
            "one; an optimizer that treats elements one by one is faster with {%r: 'elementwise'} in its groups",
            optimizer.__module__,
            optimizer.__qualname__,
            KEY,
            KEY,
        )
    return [_parsed(group[KEY]) if KEY in group else known or UpdateKind.TENSOR for group in groups]


def _check_statistics(optimizer: torch.optim.Optimizer, kinds: Sequence[UpdateKind]) -> None:
    """Refuse groups without sums over tensors in an optimizer that takes them for all of its groups."""
    if optimizer.defaults.get(KEY) != UpdateKind.STATISTICS.value:
        return
    others = {index: kind for index, kind in enumerate(kinds) if kind is not UpdateKind.STATISTICS}
    if len(others) == len(kinds) and all(kind.whole for kind in kinds):
        return  # whole tensors need nobody's sums
    for index, kind in others.items():
        raise ValueError(
            f"parameter group {index} declares {KEY} {kind.value!r}, but {type(optimizer).__name__} takes sums over "
            f"whole tensors in all groups ({UpdateKind.STATISTICS.value!r}): leave the key out of this group, or "
            f"declare {UpdateKind.TENSOR.value!r} for all groups"
        )


def _known(optimizer: type[torch.optim.Optimizer]) -> UpdateKind | None:
    if optimizer in ELEMENTWISE:
        return UpdateKind.ELEMENTWISE
    # not all releases of torch have all of them
    for kind, names in ((UpdateKind.TENSOR, _TENSOR), (UpdateKind.MATRIX, _MATRIX)):
        if optimizer in [vars(torch.optim)[name] for name in names if name in vars(torch.optim)]:
            return kind
    return None


def _parsed(value: object) -> UpdateKind:
    try:
        return UpdateKind(value)
    except ValueError:
        known = ", ".join(kind.value for kind in UpdateKind)
        raise ValueError(f"{KEY} of a parameter group is one of {known}; got {value!r}") from None
