"""Adagrad: steps divided by the root of all squares so far."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.optim.optimizer import ParamsT

from ..config import check_hyperparameters
from ..fused import FusedOptimizer
from ..hyper import AdagradHyper


class FusedAdagrad(FusedOptimizer):
    """Adagrad, in place of ``torch.optim.Adagrad``; states load either way.

    A step moves 20 bytes per element in float32, of a bfloat16 parameter 18. The sum of squares grows without bounds,
    so its increments are lost in few bits: ``moments`` is best left at ``fp32``.

    Args:
        params: Parameters, or parameter groups; float32, or bfloat16 with an exact float32 master.
        lr: Learning rate.
        lr_decay: The learning rate is divided by ``1 + (step - 1) * lr_decay``.
        weight_decay: Added to the gradient, times the parameter.
        initial_accumulator_value: Sum of squares before the first step.
        eps: Added to the root of the sum of squares.
        storage: ``moments``, ``zero_grad`` and ``kernels``, as in :class:`ds_kernels.Adam`.

    Raises:
        ValueError: If a setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = FusedAdagrad([weight], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, -3.0])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.5000, 1.5000])

    Reference:
        Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011.
    """

    op = "adagrad"
    moments = MappingProxyType({"sum": 1})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **storage: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults, **storage)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check that all settings are at least 0."""
        check_hyperparameters(group["lr"], (), group["eps"], group["weight_decay"])
        for name in ("lr_decay", "initial_accumulator_value"):
            if not group[name] >= 0.0:
                raise ValueError(f"{name} must be at least 0; got {group[name]!r}")

    def initial(self, group: Mapping[str, Any]) -> float:
        """Return ``initial_accumulator_value``."""
        return float(group["initial_accumulator_value"])

    def hyper(self, group: Mapping[str, Any], step: int, scale: float, *, zero_grad: bool) -> AdagradHyper:
        """Return the numbers of a step."""
        numbers = {name: float(group[name]) for name in ("lr", "lr_decay", "eps", "weight_decay")}
        return AdagradHyper(step=step, **numbers, scale=scale, zero_grad=zero_grad)
