"""A schedule made for what the first steps of a training have cost, on the ranks and with the stages there are.

Costs that were measured beforehand, layer by layer on a machine that does nothing else, are not those of the run: there
memory is cold, ranks share processors and caches, and messages wait. What a step of the run itself has cost is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from .build import halved, make_greedy_schedule
from .costs import Costs
from .instruction import COMPUTE
from .orders import Slot
from .pipeline import Pipeline
from .refine import kept_peaks
from .schedule import Schedule, splits_backward
from .simulate import simulate
from .times import Times

_log = logging.getLogger(__package__)


class Next(NamedTuple):
    """What the next step is run by."""

    pipeline: Pipeline
    times: Times | None  # that note it


class Replanning:
    """Runs the first steps to see what they cost, and makes the schedule of all others from that; ranks stay in step.

    The first one warms up. The others are timed: every second one as the schedule says, those between with backward
    passes in halves, so that both ways are known; the bits are the same. Then :func:`make_greedy_schedule` makes a
    schedule for the same stages on the same ranks, which keeps no more activations than the one before. If it is
    predicted to take less time it takes over.

    Args:
        schedule: Of the first steps.
        connect: Makes a pipeline of a schedule; called in the same order on all ranks.
        steps: After which the schedule is made; at least 3.
        agree: Returns, of the costs that each pipeline of the job has measured, the ones that count. Pipelines whose
            gradients are added up have to compute in one order.

    Raises:
        ValueError: Fewer steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        connect: Callable[[Schedule], Pipeline],
        steps: int,
        agree: Callable[[Costs], Costs],
    ) -> None:
        if steps < 3:
            raise ValueError(f"one step warms up, and two are measured: replan after at least 3 steps; got {steps}")
        self._connect = connect
        self._agree = agree
        self._steps = steps
        self._done = 0
        self._times = Times()
        self._pipeline = connect(schedule)
        self._halved = self._pipeline if splits_backward(schedule) else connect(halved(schedule))

    def next(self) -> Next:
        """Return what the next step is run by; all ranks call it before each step."""
        number, self._done = self._done, self._done + 1
        if 0 < number < self._steps:
            return Next(self._halved if number % 2 else self._pipeline, self._times)
        if number == self._steps:
            self._pipeline = self._halved = self._replanned()
        return Next(self._pipeline, None)

    def _replanned(self) -> Pipeline:
        before = self._pipeline.schedule
        costs = self._agree(self._pipeline.costs(self._times))
        order = [[Slot(one.op, one.stage, one.micro_batch) for one in row if one.op in COMPUTE] for row in before.rows]
        made = make_greedy_schedule(
            costs,
            num_ranks=before.num_ranks,
            num_micro_batches=before.num_micro_batches,
            placement=before.placement,
            memory=kept_peaks(order, before.placement, costs),
            skips=before.skips,
        )
        was, now = (simulate(schedule, costs).seconds for schedule in (before, made))
        better = now < was
        _log.info(
            "pipeline: by the costs of the first steps %s takes %.4g s a step, a schedule made for them %.4g s: %s",
            before.name,
            was,
            now,
            "it takes over" if better else "nothing changes",
        )
        return self._connect(made) if better else self._pipeline
