"""What the optimizers here share: reading settings, the loop over parameters, Adam's moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..tensor_sums import SumsOfSquares, local_sums


class Work(NamedTuple):
    """A parameter to step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]


class PlainOptimizer(torch.optim.Optimizer):
    """``step`` with its closure; subclasses say what one step does in :meth:`update`."""

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(
            [
                Work(param, param.grad, self.state[param], group)
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            ]
        )
        return loss

    def update(self, work: list[Work]) -> None:
        """Step the parameters."""
        raise NotImplementedError(f"{type(self).__name__} has to say what a step does")


class StatisticsOptimizer(PlainOptimizer):
    """An optimizer whose updates depend on sums of squares over tensors; see [Note: Kinds of optimizers]."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._sums: SumsOfSquares = local_sums
        super().__init__(params, {**defaults, "update_kind": "statistics"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in ``torch.optim``."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def share_sums(self, sums: SumsOfSquares) -> None:
        """Take the sums from ``sums`` from now on: parameters are parts of tensors."""
        self._sums = sums

    def norms(self, work: list[Work], *values: list[Tensor]) -> Iterator[tuple[float, ...]]:
        """Return, for each parameter, the L2 norm of its tensor in each of ``values``."""
        sums = self._sums([each.param for each in work], values)
        return zip(*([square**0.5 for square in of_kind] for of_kind in sums), strict=True)


def adam_direction(each: Work, betas: tuple[float, float], eps: float, *, bias_correction: bool) -> Tensor:
    """Update the moments in ``each.state`` and return ``m / (sqrt(v) + eps)``, like the parameter."""
    state, (beta1, beta2) = each.state, betas
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(each.param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(each.param, memory_format=torch.preserve_format)
    state["step"] += 1
    state["exp_avg"].mul_(beta1).add_(each.grad, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(each.grad, each.grad, value=1 - beta2)
    corrections = [1 - beta ** state["step"] if bias_correction else 1.0 for beta in betas]
    denominator = (state["exp_avg_sq"] / corrections[1]).sqrt_().add_(eps)
    direction: Tensor = (state["exp_avg"] / corrections[0]).div_(denominator)
    return direction


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings out of their bounds.

    Raises:
        ValueError: One is; the text names it.
    """
    for name in ("lr", "eps", "weight_decay", "trust"):
        value = settings.get(name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must not be negative; got {value!r}")
    decays = {f"betas[{index}]": beta for index, beta in enumerate(settings.get("betas") or ())}
    for name, value in {**decays, "momentum": settings.get("momentum", 0.0)}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {value!r}")
