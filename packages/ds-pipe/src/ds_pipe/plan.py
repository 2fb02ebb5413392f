"""Compares schedules for given costs: every one there is, cut by time, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .build import make_greedy_schedule, make_schedule
from .costs import Costs
from .instruction import Op
from .measure import staged
from .orders import ORDERS, loop, vee
from .partition import balanced
from .schedule import Schedule
from .simulate import Timeline, simulate
from .validate import peak_bytes


class Plan(NamedTuple):
    """A schedule, and what it would be like."""

    name: str
    schedule: Schedule
    bounds: Sequence[int]  # where layers are cut into stages
    timeline: Timeline
    peak_bytes: Sequence[float]  # by rank, as of ``peak_bytes``
    fits: bool  # into the memory there is

    @property
    def num_messages(self) -> int:
        """Messages between ranks in one step."""
        return sum(one.op is Op.SEND for row in self.schedule.rows for one in row)


class Plans(NamedTuple):
    """What :func:`compare` found."""

    plans: Sequence[Plan]  # those that fit first, by time of a step
    impossible: dict[str, str]  # why there is no such schedule, by name


def compare(costs: Costs, *, num_ranks: int, num_micro_batches: int, memory: float | None = None) -> Plans:
    """Return every schedule for a model, the fastest first.

    Args:
        costs: Of each layer.
        num_ranks: Ranks of the pipeline.
        num_micro_batches: In one step.
        memory: Bytes that kept activations, gradients and messages may take on each rank; greedy schedules keep within
            for activations, the others fit or do not. None: no limit for those, and for greedy ones what 1F1B keeps.

    Raises:
        ValueError: There are fewer layers than ranks.

    Example:
        >>> found = compare(Costs.uniform(8), num_ranks=2, num_micro_batches=4)
        >>> found.plans[0].name, found.plans[0].timeline.seconds, found.plans[-1].name
        ('zb_v', 50.0, '1f1b')
    """
    plans: list[Plan] = []
    impossible: dict[str, str] = {}
    for name, chunks, make in _makers(num_ranks, num_micro_batches, memory):
        if costs.num_stages < chunks * num_ranks:
            impossible[name] = f"it has {chunks * num_ranks} stages, and there are {costs.num_stages} layers"
            continue
        bounds = balanced(_seconds(costs), chunks * num_ranks)
        of_stages = staged(costs, bounds)
        try:
            schedule = make(of_stages)
        except ValueError as error:
            impossible[name] = str(error)
            continue
        peak = peak_bytes(schedule, of_stages)
        fits = memory is None or max(peak) <= memory
        plans.append(Plan(name, schedule, bounds, simulate(schedule, of_stages), peak, fits))
    if not plans:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return Plans(sorted(plans, key=lambda plan: (not plan.fits, plan.timeline.seconds)), impossible)


Maker = Callable[[Costs], Schedule]


def _makers(num_ranks: int, num_micro_batches: int, memory: float | None) -> Iterator[tuple[str, int, Maker]]:
    """Return names, stages on each rank, and what makes a schedule of costs."""
    for name, fixed in ORDERS.items():
        fewest, most = fixed.chunks
        if name != "forward_only":
            for chunks in (fewest,) if most == fewest else (fewest, 2 * fewest):
                made = _fixed(name, chunks, num_ranks, num_micro_batches)
                yield name if chunks == fewest else f"{name} ({chunks} stages a rank)", chunks, made
    placements = {
        "greedy": loop(num_ranks),
        "greedy (2 stages a rank)": loop(num_ranks, 2),
        "greedy (V)": vee(num_ranks),
    }
    for name, placement in placements.items():
        yield name, len(placement) // num_ranks, _greedy(placement, num_ranks, num_micro_batches, memory)


def _fixed(name: str, chunks: int, num_ranks: int, num_micro_batches: int) -> Maker:
    return lambda costs: make_schedule(
        name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_chunks=chunks, costs=costs
    )


def _greedy(placement: Sequence[int], num_ranks: int, num_micro_batches: int, memory: float | None) -> Maker:
    return lambda costs: make_greedy_schedule(
        costs,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=placement,
        memory=None if memory is None else num_ranks * [memory],
    )


def _seconds(costs: Costs) -> list[float]:
    return [sum(each) for each in zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)]
