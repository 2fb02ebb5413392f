"""What modules of stages with skips return, and a module that computes with the weights of another stage."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call


class Handed(NamedTuple):
    """What a stage's module returns if it has skips to hand out; see [Note: Skips].

    Example:
        >>> import torch
        >>> class Down(nn.Module):
        ...     def forward(self, value: Tensor) -> Handed:
        ...         return Handed(value.relu(), {"residual": value.view_as(value)})
        >>> out, skips = Down()(torch.ones(2))
        >>> list(skips)
        ['residual']
    """

    out: Any  # for the next stage
    skips: Mapping[str, Any]  # by name


class Borrower(nn.Module):
    """A stage's module that lacks some weights: they come with each micro-batch, as skips.

    The module's own parameters of these names are given up: they are neither trained nor saved here, but where they
    come from.

    Args:
        module: Of the stage; changed.
        weights: By name of the parameter, the skip that brings it.

    Raises:
        AttributeError: The module has no such parameter.

    Example:
        >>> import torch
        >>> head = Borrower(nn.Linear(2, 5, bias=False), {"weight": "tied"})
        >>> list(head.parameters()), head(torch.ones(3, 2), skips={"tied": torch.ones(5, 2)}).shape
        ([], torch.Size([3, 5]))
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, str]) -> None:
        super().__init__()
        self.module = module
        self._weights = MappingProxyType(dict(weights))
        for name in weights:
            inner, _, attribute = name.rpartition(".")
            module.get_parameter(name)
            module.get_submodule(inner).register_parameter(attribute, None)

    def forward(self, value: Any, *, skips: Mapping[str, Tensor]) -> Any:
        """Run the module; skips that are no weights are handed on to it."""
        weights = {name: skips[skip] for name, skip in self._weights.items()}
        others = {name: skip for name, skip in skips.items() if name not in self._weights.values()}
        return functional_call(self.module, weights, (value,), {"skips": others} if others else {}, tie_weights=False)
