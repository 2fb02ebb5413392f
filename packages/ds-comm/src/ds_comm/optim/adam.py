"""Adam's moments on flat buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import FlatOptimizer


class AdamMoments(FlatOptimizer):
    """Updates moments and divides them; subclasses say when, and what is communicated."""

    _denominator: Tensor | None = None

    def betas(self, index: int) -> list[float]:
        """Return ``betas[index]`` of each group."""
        return [float(group["betas"][index]) for group in self.param_groups]

    def average(self, gradient: Tensor) -> None:
        """Update the first moment."""
        for part, beta in zip(self._flat.parts, self.betas(0), strict=True):
            self._buffers["exp_avg"][part].lerp_(gradient[part], 1 - beta)

    def average_squares(self, gradient: Tensor, name: str = "exp_avg_sq") -> None:
        """Update the second moment that is called ``name``."""
        for part, beta in zip(self._flat.parts, self.betas(1), strict=True):
            self._buffers[name][part].mul_(beta).addcmul_(gradient[part], gradient[part], value=1 - beta)

    def denominator(self, out: Tensor, steps: tuple[int, int] | None = None, name: str = "exp_avg_sq") -> Tensor:
        """Write into ``out`` what the first moment is divided by, ``sqrt(v) + eps``, and return it.

        With ``steps``, updates of the two moments, groups with ``bias_correction`` have both corrected: v is divided by
        ``1 - beta2**steps``, and the result multiplied by ``1 - beta1**steps``.
        """
        for part, group in zip(self._flat.parts, self.param_groups, strict=True):
            divide_by(out[part].copy_(self._buffers[name][part]), group, steps)
        return out

    def fold_corrections(self, steps: tuple[int, int]) -> None:
        """Correct the moments for good, where groups have ``bias_correction``: no later step does."""
        for part, group in zip(self._flat.parts, self.param_groups, strict=True):
            for name, correction in zip(("exp_avg", "exp_avg_sq"), corrections(group, steps), strict=True):
                self._buffers[name][part].div_(correction)

    def frozen_denominator(self) -> Tensor:
        """Return the denominator of a variance that no longer changes; computed once."""
        if self._denominator is None:
            self._denominator = self.denominator(self._flat.new())
        return self._denominator

    def loaded(self) -> None:
        """Renew what was derived from the state."""
        self._denominator = None


def divide_by(v: Tensor, group: Mapping[str, Any], steps: tuple[int, int] | None) -> Tensor:
    """Turn the second moment ``v`` into what the first is divided by, in place; see :meth:`AdamMoments.denominator`."""
    root = v.sqrt_()
    first, second = corrections(group, steps)
    if (first, second) != (1.0, 1.0):
        return root.mul_(second**-0.5).add_(group["eps"]).mul_(first)
    return root.add_(group["eps"])


def corrections(group: Mapping[str, Any], steps: tuple[int, int] | None) -> tuple[float, float]:
    """Return ``1 - beta**steps`` of both moments; 1 where the group has no correction."""
    if steps is None or not group["bias_correction"]:
        return 1.0, 1.0
    first, second = (1 - float(beta) ** step for beta, step in zip(group["betas"], steps, strict=True))
    return first, second


class WarmedUpMoments(AdamMoments):
    """Exchanges gradients until step ``freeze_step``, and later codes, with the variance as it was then."""

    freeze_step: int

    def update(self) -> bool:
        """Step the parameters; return False, and change nothing, if some rank's gradients are not finite."""
        step = self.count("step") + 1
        if not (self.warm_up(step) if step <= self.freeze_step else self.compressed()):
            return False
        self.set_counts(step=step)
        return True

    def warm_up(self, step: int) -> bool:
        """Do step number ``step``, up to ``freeze_step``; as :meth:`update`."""
        raise NotImplementedError(f"{type(self).__name__} has to say what a step of the warm-up does")

    def compressed(self) -> bool:
        """Do a later step; as :meth:`update`."""
        raise NotImplementedError(f"{type(self).__name__} has to say what a later step does")


def checked_freeze_step(freeze_step: int) -> int:
    """Return ``freeze_step`` if there is a warm-up."""
    if freeze_step < 1:
        raise ValueError(f"freeze_step must be at least 1: the variance is made until then; got {freeze_step}")
    return freeze_step
