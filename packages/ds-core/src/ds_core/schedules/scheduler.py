"""Applying a schedule to the parameter groups of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .._log import logger
from .formulas import Schedule, Values


class NotSteppedError(RuntimeError, AssertionError):
    """A value was asked for before the first step.

    Also an AssertionError, because callers of DeepSpeed's schedulers (Hugging Face's Trainer) catch that
    class while a dynamic loss scale skips the first steps.
    """


class Scheduler:
    """Applies a schedule to the parameter groups of an optimizer.

    The values of step -1 are written at once. See [Note: Steps of a schedule].

    Args:
        optimizer: Its ``param_groups`` are written; the learning rates it holds now are the base ones.
        schedule: The formula.

    Raises:
        ValueError: If the schedule gives one number for each group, and their count is another.

    Example:
        >>> from ds_core.schedules import WarmupLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> scheduler = Scheduler(optimizer, WarmupLR(warmup_num_steps=2, warmup_type="linear"))
        >>> scheduler.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.5]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._last_step = -1
        if self._values().betas is not None and "betas" not in optimizer.defaults:
            logger.warning(
                "%r cycles momentum, but %s has no 'betas': only the learning rate will change; "
                "set cycle_momentum to false to say so",
                type(schedule).__name__,
                type(optimizer).__name__,
            )
        self._write()

    def step(self) -> None:
        """Go on by one step and write its values. Call after each optimizer step that was not skipped."""
        self._last_step += 1
        self._write()

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group, also before the first step."""
        return self._values().lrs

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each parameter group as of the last step.

        Raises:
            NotSteppedError: If there was no step yet.
        """
        if self._last_step < 0:
            raise NotSteppedError(
                f"need to call step() first: {self._last_step + 1} scheduler steps were made, so there is no "
                "last learning rate; get_lr() gives the initial one"
            )
        return self._values().lrs

    def state_dict(self) -> dict[str, int]:
        """Return the state as JSON values, under DeepSpeed's name."""
        return {"last_batch_iteration": self._last_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved step and write its values, whatever the parameter groups hold.

        Raises:
            ValueError: If the state is not one of :meth:`state_dict`.
        """
        step = state.get("last_batch_iteration")
        if step is None or set(state) != {"last_batch_iteration"} or step < -1:
            raise ValueError(
                f"a scheduler's state is {{'last_batch_iteration': <step, at least -1>}}, got {dict(state)}"
            )
        self._last_step = step
        self._write()

    def _values(self) -> Values:
        return self._schedule.values(self._last_step, self._base_lrs)

    def _write(self) -> None:
        values = self._values()
        for index, group in enumerate(self._optimizer.param_groups):
            if isinstance(group["lr"], torch.Tensor):
                # A compiled or captured step reads this tensor; replacing it would leave the old one in use.
                group["lr"].fill_(values.lrs[index])
            else:
                group["lr"] = values.lrs[index]
            if values.betas is not None and "betas" in group:
                group["betas"] = values.betas[index]
