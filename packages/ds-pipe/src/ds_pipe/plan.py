"""Compares schedules for given costs: every one there is, cut by time, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .build import make_greedy_schedule, make_schedule
from .costs import Costs
from .instruction import Op
from .measure import staged
from .orders import ORDERS, TRAINING, loop, vee
from .partition import balanced
from .refine import fixed_orders, kept_peaks
from .schedule import Schedule
from .simulate import Timeline, simulate
from .validate import peak_bytes

_TRIES = 4  # greedy schedules, each for less room than the one before


class Plan(NamedTuple):
    """A schedule, and what it would be like."""

    name: str
    schedule: Schedule
    bounds: Sequence[int]  # where layers are cut into stages
    timeline: Timeline
    peak_bytes: Sequence[float]  # by rank, as of ``peak_bytes``, and ``held_bytes`` of its stages
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

    No fixed schedule that fits is faster than the greedy one for the same stages on the same ranks.

    Args:
        costs: Of each layer.
        num_ranks: Ranks of the pipeline.
        num_micro_batches: In one step.
        memory: Bytes of each rank, for ``costs.held_bytes``, kept activations, gradients and messages; greedy schedules
            are made to fit, the others fit or do not. None: no limit; greedy schedules keep no more activations than
            the fixed one for the same stages on the same ranks that keeps the most.

    Raises:
        ValueError: There are fewer layers than ranks, or numbers that cannot be.

    Example:
        >>> found = compare(Costs.uniform(8), num_ranks=2, num_micro_batches=4)
        >>> found.plans[0].name, found.plans[0].timeline.seconds, found.plans[-1].name
        ('greedy (4 stages a rank)', 49.0, '1f1b')
    """
    if num_ranks < 1 or num_micro_batches < 1 or not (memory is None or memory > 0):
        raise ValueError(
            f"at least one rank and one micro-batch, and some memory; got {num_ranks}, {num_micro_batches} and {memory}"
        )
    plans: list[Plan] = []
    impossible: dict[str, str] = {}
    for name, placement, make in _makers(num_ranks):
        if costs.num_stages < len(placement):
            impossible[name] = f"it has {len(placement)} stages, and there are {costs.num_stages} layers"
            continue
        bounds = balanced(_seconds(costs), len(placement))
        task = _Task(staged(costs, bounds), placement, num_ranks, num_micro_batches, memory)
        try:
            made = [Plan(name, schedule, bounds, *_judged(schedule, task)) for schedule in make(task)]
        except ValueError as error:
            impossible[name] = str(error)
            continue
        if make is _greedy:
            made += [plan._replace(name=name) for plan in plans if plan.schedule.placement == placement]
        plans.append(min(made, key=_rank))
    if not plans:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return Plans(sorted(plans, key=_rank), impossible)


class _Task(NamedTuple):
    """What a schedule is made for."""

    costs: Costs  # of its stages
    placement: tuple[int, ...]
    num_ranks: int
    num_micro_batches: int
    memory: float | None

    @property
    def held(self) -> list[float]:
        """Bytes that each rank has throughout."""
        held = self.costs.held_bytes or (0.0,) * self.costs.num_stages
        return [sum(held[s] for s, owner in enumerate(self.placement) if owner == r) for r in range(self.num_ranks)]


Maker = Callable[[_Task], Sequence[Schedule]]


def _judged(schedule: Schedule, task: _Task) -> tuple[Timeline, Sequence[float], bool]:
    """Return what a schedule takes, in time and memory, and whether it fits."""
    peaks = [sum(each) for each in zip(task.held, peak_bytes(schedule, task.costs), strict=True)]
    return simulate(schedule, task.costs), peaks, task.memory is None or max(peaks) <= task.memory


def _rank(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.timeline.seconds


def _makers(num_ranks: int) -> Iterator[tuple[str, tuple[int, ...], Maker]]:
    """Return names, placements, and what makes schedules of which the best counts; greedy ones last."""
    most_chunks = 1
    for name in TRAINING:
        fewest, most = ORDERS[name].chunks
        for chunks in (fewest,) if most == fewest else (fewest, 2 * fewest):
            most_chunks = max(most_chunks, chunks)
            yield (
                name if chunks == fewest else f"{name} ({chunks} stages a rank)",
                ORDERS[name].placement(num_ranks, chunks),
                _fixed(name, chunks),
            )
    for chunks in (1, 2, most_chunks):
        yield "greedy" if chunks == 1 else f"greedy ({chunks} stages a rank)", loop(num_ranks, chunks), _greedy
    yield "greedy (V)", vee(num_ranks), _greedy


def _fixed(name: str, chunks: int) -> Maker:
    return lambda task: [
        make_schedule(
            name,
            num_ranks=task.num_ranks,
            num_micro_batches=task.num_micro_batches,
            num_chunks=chunks,
            costs=task.costs,
        )
    ]


def _greedy(task: _Task) -> list[Schedule]:
    """Return schedules with ever less room for activations, until all there is fits.

    Raises:
        ValueError: One micro-batch does not fit.
    """
    room = _most_kept(task) if task.memory is None else _left(task.held, task.memory)
    made: list[Schedule] = []
    for _ in range(_TRIES):
        try:
            schedule = make_greedy_schedule(
                task.costs,
                num_ranks=task.num_ranks,
                num_micro_batches=task.num_micro_batches,
                placement=task.placement,
                memory=room,
            )
        except ValueError:
            if not made:
                raise
            return made
        made.append(schedule)
        _, peaks, fits = _judged(schedule, task)
        if fits or task.memory is None:
            return made
        room = [left - max(0.0, peak - task.memory) for left, peak in zip(room, peaks, strict=True)]
    return made


def _most_kept(task: _Task) -> list[float]:
    """Return, by rank, the most bytes of activations that a fixed schedule with this placement keeps."""
    anything = [float("inf")] * task.num_ranks
    orders = fixed_orders(task.num_micro_batches, task.placement, task.costs, anything)
    peaks = [kept_peaks(order, task.placement, task.costs) for order in orders]
    return [max(each) for each in zip(*peaks, strict=True)]


def _left(held: Sequence[float], memory: float) -> list[float]:
    for rank, each in enumerate(held):
        if each >= memory:
            raise ValueError(f"weights alone take {each:.0f} bytes of rank {rank}, which has {memory:.0f}")
    return [memory - each for each in held]


def _seconds(costs: Costs) -> list[float]:
    return [sum(each) for each in zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)]
