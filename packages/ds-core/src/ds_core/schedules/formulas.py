"""Learning rate schedules, each a closed formula of the step.

[Note: Steps of a schedule]
``step`` counts scheduler steps that were made, minus one: -1 before the first (what the optimizer starts
with), 0 after the first, and so on. Names of parameters, defaults and formulas are DeepSpeed's, so that its
JSON files and its learning rate curves carry over to 1e-12. One difference: an unknown ``warmup_type`` is an
error, not a warning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

from .._log import logger

PerGroup: TypeAlias = float | tuple[float, ...]
"""One number for all parameter groups, or one for each."""

WarmupType: TypeAlias = Literal["log", "linear"]

_BETA2 = 0.99  # OneCycle sets both betas; this is the second one


class Values(NamedTuple):
    """What a schedule sets at one step."""

    lrs: list[float]  # one for each parameter group
    betas: list[tuple[float, float]] | None  # likewise; None where the schedule leaves momentum alone


class Schedule(Protocol):
    """A closed formula of the step."""

    def values(self, step: int, base_lrs: Sequence[float]) -> Values:
        """Return what holds at ``step``, given the learning rates that the parameter groups were made with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupLR:
    """Rises from a low to a high learning rate, and stays there.

    ``lr(t) = low + (high - low) * g(t)`` with ``g(t) = log(t + 1) / log(n)`` or ``t / n`` while ``t < n``,
    then 1.

    Example:
        >>> WarmupLR(warmup_num_steps=4, warmup_type="linear", warmup_max_lr=1.0).values(1, [0.5]).lrs
        [0.25]

    Reference:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, arXiv:1706.02677
        (the linear form).
    """

    warmup_min_lr: PerGroup = 0.0
    """Learning rate to start from; a list gives one for each parameter group."""
    warmup_max_lr: PerGroup | None = None
    """Learning rate to reach; None takes the optimizer's own."""
    warmup_num_steps: int = 1000
    """Steps to get there, positive; 1 counts as 2, because the logarithmic form divides by log(n)."""
    warmup_type: WarmupType = "log"
    """Shape of the rise."""

    def __post_init__(self) -> None:
        _check_positive("warmup_num_steps", self.warmup_num_steps)

    def values(self, step: int, base_lrs: Sequence[float]) -> Values:
        """Return what holds at ``step``. See [Note: Steps of a schedule]."""
        low = _per_group(self.warmup_min_lr, len(base_lrs), "warmup_min_lr")
        if self.warmup_max_lr is None:
            high = list(base_lrs)
        else:
            high = _per_group(self.warmup_max_lr, len(base_lrs), "warmup_max_lr")
        gain = _warmup(step, self.warmup_num_steps, self.warmup_type)
        return Values(_between(low, high, 1.0 if gain is None else gain), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupDecayLR:
    """Rises as :class:`WarmupLR` does, then falls linearly to zero.

    ``lr(t) = low + (high - low) * max(0, (total - t) / max(1, total - n))`` from step ``n`` on.

    Example:
        >>> schedule = WarmupDecayLR(total_num_steps=12, warmup_num_steps=2, warmup_max_lr=1.0)
        >>> schedule.values(7, [0.5]).lrs
        [0.5]
    """

    total_num_steps: int
    """Step at which the low learning rate is reached again."""
    warmup_min_lr: PerGroup = 0.0
    """Learning rate to start from and to end at; a list gives one for each parameter group."""
    warmup_max_lr: PerGroup = 0.001
    """Learning rate to reach."""
    warmup_num_steps: int = 1000
    """Steps to get there, positive; 1 counts as 2."""
    warmup_type: WarmupType = "log"
    """Shape of the rise."""

    def __post_init__(self) -> None:
        _check_positive("warmup_num_steps", self.warmup_num_steps)
        _warn_short(self.total_num_steps, self.warmup_num_steps)

    def values(self, step: int, base_lrs: Sequence[float]) -> Values:
        """Return what holds at ``step``. See [Note: Steps of a schedule]."""
        low = _per_group(self.warmup_min_lr, len(base_lrs), "warmup_min_lr")
        high = _per_group(self.warmup_max_lr, len(base_lrs), "warmup_max_lr")
        gain = _warmup(step, self.warmup_num_steps, self.warmup_type)
        if gain is None:
            decay_steps = max(1, self.total_num_steps - max(2, self.warmup_num_steps))
            gain = max(0.0, (self.total_num_steps - step) / decay_steps)
        return Values(_between(low, high, gain), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupCosineLR:
    """Multiplies the optimizer's learning rate by a ratio that rises to 1, then falls along a cosine.

    From step ``n`` on, with ``p = min(1, (t - n + 1) / max(1, total - n))``:
    ``ratio(t) = cos_min_ratio + (1 - cos_min_ratio) * (1 + cos(pi * p)) / 2``. Before the first step the
    ratio is 0, not ``warmup_min_ratio``: DeepSpeed's choice, kept so that runs agree.

    Example:
        >>> WarmupCosineLR(total_num_steps=10, warmup_num_steps=2, cos_min_ratio=0.0).values(5, [1.0]).lrs
        [0.5]

    Reference:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv:1608.03983.
    """

    total_num_steps: int
    """Step at which the smallest ratio is reached."""
    warmup_min_ratio: float = 0.0
    """Ratio at step 0."""
    warmup_num_steps: int = 1000
    """Steps to ratio 1, positive; 1 counts as 2."""
    cos_min_ratio: float = 0.0001
    """Ratio at the end, and ever after."""
    warmup_type: WarmupType = "log"
    """Shape of the rise."""

    def __post_init__(self) -> None:
        _check_positive("warmup_num_steps", self.warmup_num_steps)
        _warn_short(self.total_num_steps, self.warmup_num_steps)

    def values(self, step: int, base_lrs: Sequence[float]) -> Values:
        """Return what holds at ``step``. See [Note: Steps of a schedule]."""
        ratio = 0.0 if step < 0 else self._ratio(step)
        return Values([lr * ratio for lr in base_lrs], None)

    def _ratio(self, step: int) -> float:
        gain = _warmup(step, self.warmup_num_steps, self.warmup_type)
        if gain is not None:
            return self.warmup_min_ratio + gain * (1.0 - self.warmup_min_ratio)
        warmup = max(2, self.warmup_num_steps)
        progress = min(1.0, (step - warmup + 1) / max(1, self.total_num_steps - warmup))
        height = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * height)


@dataclass(frozen=True, kw_only=True, slots=True)
class OneCycle:
    """One rise and fall of the learning rate, with momentum going the other way; then a slow decay.

    With ``t = step + 1`` and ``s(t)`` going linearly 0, 1, 0 over the two halves of the cycle:
    ``lr = min_lr + (max_lr - min_lr) * s`` and ``beta1 = max_mom - (max_mom - min_mom) * s``. Afterwards,
    every ``decay_step_size`` steps, ``lr`` is divided by one ``decay_lr_rate`` more and ``beta1`` multiplied
    likewise. Before the first step beta1 is ``cycle_min_mom``, although the cycle then says
    ``cycle_max_mom``: DeepSpeed's choice, kept so that runs agree. Beta2 is set to 0.99.

    Example:
        >>> cycle = OneCycle(cycle_min_lr=0.0, cycle_max_lr=1.0, cycle_first_step_size=4)
        >>> cycle.values(1, [0.1]).lrs, cycle.values(3, [0.1]).betas
        ([0.5], [(0.8, 0.99)])

    Reference:
        Smith, "A disciplined approach to neural network hyper-parameters: Part 1", 2018, arXiv:1803.09820.
    """

    cycle_min_lr: PerGroup
    """Learning rate at both ends of the cycle."""
    cycle_max_lr: PerGroup
    """Learning rate at its top."""
    decay_lr_rate: float = 0.0
    """Decay of the learning rate after the cycle, for each ``decay_step_size`` steps; 0 for none."""
    cycle_first_step_size: int = 2000
    """Steps of the rising half."""
    cycle_second_step_size: int | None = None
    """Steps of the falling half; None takes as many as the first."""
    cycle_first_stair_count: int = 0
    """Stairs that the first half is cut into; 0 for a smooth rise."""
    cycle_second_stair_count: int | None = None
    """Stairs of the second half; None takes as many as the first."""
    decay_step_size: int = 0
    """Steps of one unit of decay; 0 for none."""
    cycle_momentum: bool = True
    """Whether beta1 cycles too; needs an optimizer with ``betas``."""
    cycle_min_mom: PerGroup = 0.8
    """Beta1 at the top of the cycle."""
    cycle_max_mom: PerGroup = 0.9
    """Beta1 at both ends of the cycle."""
    decay_mom_rate: float = 0.0
    """Growth of beta1 after the cycle, for each ``decay_step_size`` steps; 0 for none."""

    def __post_init__(self) -> None:
        _check_positive("cycle_first_step_size", self.cycle_first_step_size)
        for name, value in (
            ("cycle_second_step_size", self.cycle_second_step_size),
            ("cycle_first_stair_count", self.cycle_first_stair_count),
            ("cycle_second_stair_count", self.cycle_second_stair_count),
            ("decay_step_size", self.decay_step_size),
        ):
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")

    def values(self, step: int, base_lrs: Sequence[float]) -> Values:
        """Return what holds at ``step``. See [Note: Steps of a schedule]."""
        num_groups = len(base_lrs)
        min_lrs = _per_group(self.cycle_min_lr, num_groups, "cycle_min_lr")
        max_lrs = _per_group(self.cycle_max_lr, num_groups, "cycle_max_lr")
        min_moms = _per_group(self.cycle_min_mom, num_groups, "cycle_min_mom")
        max_moms = _per_group(self.cycle_max_mom, num_groups, "cycle_max_mom")
        past = step - self._num_steps  # < 0 within the cycle
        if step < 0:
            lrs, moms = min_lrs, min_moms
        elif past < 0:
            height = self._height(step + 1)
            lrs, moms = _between(min_lrs, max_lrs, height), _between(max_moms, min_moms, height)
        else:
            units = (past + 1) / self.decay_step_size if self.decay_step_size else 0.0
            lrs = [lr / (1 + self.decay_lr_rate * units) for lr in min_lrs]
            moms = [mom * (1 + self.decay_mom_rate * units) for mom in max_moms]
        return Values(lrs, [(mom, _BETA2) for mom in moms] if self.cycle_momentum else None)

    @property
    def _second_step_size(self) -> int:
        second = self.cycle_second_step_size
        return self.cycle_first_step_size if second is None else second

    @property
    def _num_steps(self) -> int:
        return self.cycle_first_step_size + self._second_step_size

    def _height(self, time: int) -> float:
        """Return how far up the cycle is, 0 to 1."""
        time %= self._num_steps
        stairs = self.cycle_first_stair_count
        if time <= self.cycle_first_step_size:
            done, size = time, self.cycle_first_step_size
        else:
            done, size = self._num_steps - time, self._second_step_size
            if self.cycle_second_stair_count is not None:
                stairs = self.cycle_second_stair_count
        # Stairs are counted in whole steps: a rounded fraction just below a stair would lose all of it.
        return (done * stairs // size) / stairs if stairs else done / size


@dataclass(frozen=True, kw_only=True, slots=True)
class LRRangeTest:
    """Raises the learning rate until training diverges, to find the largest usable one.

    ``lr(t) = min_lr * (1 + step_rate * (t + 1) / step_size)``, the fraction rounded down for stairs.

    Example:
        >>> LRRangeTest(lr_range_test_min_lr=1.0, lr_range_test_step_size=4).values(1, [0.1]).lrs
        [1.5]

    Reference:
        Smith, "A disciplined approach to neural network hyper-parameters: Part 1", 2018, arXiv:1803.09820.
    """

    lr_range_test_min_lr: PerGroup = 1e-3
    """Learning rate to start from; a list gives one for each parameter group."""
    lr_range_test_step_size: int = 2000
    """Steps of one unit of the rise, positive."""
    lr_range_test_step_rate: float = 1.0
    """Rise of one unit, as a multiple of the first learning rate."""
    lr_range_test_staircase: bool = False
    """Whether to rise once a unit instead of every step."""

    def __post_init__(self) -> None:
        _check_positive("lr_range_test_step_size", self.lr_range_test_step_size)

    def values(self, step: int, base_lrs: Sequence[float]) -> Values:
        """Return what holds at ``step``. See [Note: Steps of a schedule]."""
        units = (step + 1) / self.lr_range_test_step_size
        if self.lr_range_test_staircase:
            units = float((step + 1) // self.lr_range_test_step_size)
        min_lrs = _per_group(self.lr_range_test_min_lr, len(base_lrs), "lr_range_test_min_lr")
        return Values([lr * (1 + self.lr_range_test_step_rate * units) for lr in min_lrs], None)


SCHEDULES = (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
"""The schedules a configuration file can name, by the name of the class."""


def _warmup(step: int, num_steps: int, kind: WarmupType) -> float | None:
    """Return the rise from 0 to 1 at ``step``, or None once it is over."""
    num_steps = max(2, num_steps)
    if step < 0:
        return 0.0
    if step >= num_steps:
        return None
    return math.log(step + 1) / math.log(num_steps) if kind == "log" else step / num_steps


def _between(low: Sequence[float], high: Sequence[float], gain: float) -> list[float]:
    return [a + (b - a) * gain for a, b in zip(low, high)]


def _per_group(value: PerGroup, num_groups: int, name: str) -> list[float]:
    if not isinstance(value, tuple):
        return [value] * num_groups
    if len(value) != num_groups:
        raise ValueError(
            f"{name} must be one number or one for each of the {num_groups} parameter groups, got {list(value)}"
        )
    return list(value)


def _check_positive(name: str, value: int) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be a positive whole number, got {value}")


def _warn_short(total_num_steps: int, warmup_num_steps: int) -> None:
    if total_num_steps < warmup_num_steps:
        logger.warning(
            "total_num_steps %d is less than warmup_num_steps %d: the learning rate drops when the warm-up ends",
            total_num_steps,
            warmup_num_steps,
        )
