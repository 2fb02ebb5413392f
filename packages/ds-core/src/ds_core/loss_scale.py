"""Static and dynamic loss scale as a pure state and its update.

[Note: Dynamic loss scale]
Float16 loses gradients below 6e-8, so the loss is multiplied by ``scale`` before the backward pass and the gradients
are divided by it before the step. A step whose gradients overflow is skipped. Each overflow uses up one unit of
*hysteresis*; when one is left, it halves the scale instead. A step without overflow and ``window`` more of them double
the scale and restore the hysteresis; with *consecutive* hysteresis each of them restores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .config import Fp16
    from .protocols import Json

_FACTOR = 2.0


class LossScale(NamedTuple):
    """The loss scale and all that its next value depends on; a checkpoint holds what :func:`moving` returns."""

    scale: float  # factor on the loss
    window: int = 0  # steps without overflow after which the scale doubles; 0: the scale is static
    full_hysteresis: int = 1  # overflows that lower the scale by one halving
    consecutive: bool = False  # whether every step without overflow restores the hysteresis
    min_scale: float = 1.0  # where halving ends
    hysteresis: int = 1  # overflows left until the scale is halved, counting that one
    step: int = 0  # updates so far
    last_overflow: int = -1  # update that overflowed last


def init(fp16: Fp16 | None) -> LossScale:
    """Return the loss scale a run starts with.

    Args:
        fp16: The section of the configuration; None, or not enabled, gives the static scale 1.

    Returns:
        The state for :func:`update`.

    Example:
        >>> init(None).scale
        1.0
    """
    if fp16 is None or not fp16.enabled:
        return LossScale(scale=1.0)
    if fp16.loss_scale:
        return LossScale(scale=fp16.loss_scale)
    return LossScale(
        scale=2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        full_hysteresis=fp16.hysteresis,
        consecutive=fp16.consecutive_hysteresis,
        min_scale=float(fp16.min_loss_scale),
        hysteresis=fp16.hysteresis,
    )


def update(state: LossScale, overflow: bool, /) -> LossScale:  # noqa: FBT001 - the one input, positional only
    """Return the loss scale after one step. See [Note: Dynamic loss scale].

    Args:
        state: The loss scale that the step ran with.
        overflow: Whether its gradients were not finite.

    Returns:
        The loss scale of the next step. A static one never changes.

    Raises:
        RuntimeError: If the gradients overflow at the smallest scale, where nothing is left to lower.

    Example:
        >>> state = LossScale(scale=8.0, window=2)
        >>> [(state := update(state, overflow)).scale for overflow in (True, False, False, False)]
        [4.0, 4.0, 4.0, 8.0]

    Reference:
        Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740. Hysteresis and the order of
        the tests follow DeepSpeed.
    """
    if not state.window:
        return state
    return _after_overflow(state) if overflow else _after_success(state)


def moving(state: LossScale, /) -> dict[str, Json] | None:
    """Return what updates have moved, as JSON; None for a static scale.

    The rest are settings, which each run has of its own.

    Example:
        >>> moving(LossScale(scale=8.0, window=2))
        {'scale': 8.0, 'hysteresis': 1, 'step': 0, 'last_overflow': -1}
    """
    if not state.window:
        return None
    return {
        "scale": state.scale,
        "hysteresis": state.hysteresis,
        "step": state.step,
        "last_overflow": state.last_overflow,
    }


def resumed(state: LossScale, saved: Mapping[str, Any] | None, /) -> LossScale:
    """Return ``state`` moved to where another run's was, within the bounds of this run's settings.

    Args:
        state: What this run started with.
        saved: What :func:`moving` returned for the other run.

    Returns:
        ``state`` as it is where one of the two is static.

    Example:
        >>> resumed(LossScale(scale=8.0, window=5), moving(LossScale(scale=4.0, window=2))).scale
        4.0
    """
    if not state.window or saved is None:
        return state
    return state._replace(
        scale=max(saved["scale"], state.min_scale),
        hysteresis=min(saved["hysteresis"], state.full_hysteresis),
        step=saved["step"],
        last_overflow=saved["last_overflow"],
    )


def _after_overflow(state: LossScale) -> LossScale:
    state = state._replace(step=state.step + 1, last_overflow=state.step)
    if state.hysteresis > 1:
        return state._replace(hysteresis=state.hysteresis - 1)
    if state.scale == state.min_scale:
        raise RuntimeError(
            f"the gradients overflow at the smallest loss scale, fp16.min_loss_scale = {state.min_scale:g}, "
            f"after {state.step} steps; look for a cause in the model or the learning rate, train in bf16, "
            "or lower fp16.min_loss_scale"
        )
    return state._replace(scale=max(state.scale / _FACTOR, state.min_scale))


def _after_success(state: LossScale) -> LossScale:
    stable = state.step - state.last_overflow - 1
    grow = stable > 0 and stable % state.window == 0
    return state._replace(
        scale=state.scale * _FACTOR if grow else state.scale,
        hysteresis=state.full_hysteresis if grow or state.consecutive else state.hysteresis,
        step=state.step + 1,
    )
