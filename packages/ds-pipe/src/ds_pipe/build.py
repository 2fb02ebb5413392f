"""Schedules by name, whole and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from .costs import Costs
from .instruction import COMPUTE, Op
from .lower import lower
from .orders import ORDERS, TRAINING, Slot, loop
from .refine import best_order, fixed_orders, halves
from .schedule import Schedule
from .simulate import simulate
from .skips import Skip, checked
from .validate import validate


def make_schedule(
    name: str,
    *,
    num_ranks: int,
    num_micro_batches: int,
    num_chunks: int | None = None,
    costs: Costs | None = None,
    skips: Iterable[tuple[int, int, str] | Skip] = (),
) -> Schedule:
    """Return a fixed schedule; validated.

    Args:
        name: One of ``gpipe``, ``1f1b``, ``interleaved``, ``looped_bfs``, ``zb_h1``, ``zb_v``; ``forward_only`` has no
            backward passes.
        num_ranks: Ranks of the pipeline.
        num_micro_batches: In one step.
        num_chunks: Stages on each rank; None: as few as the schedule has.
        costs: Order messages among computations; None: all stages take equally long.
        skips: Values that go past stages: source, target, name, and whether they are constant; see ``Skip``.

    Raises:
        ValueError: No such schedule, or not with these numbers; says which there are.

    Example:
        >>> print(make_schedule("1f1b", num_ranks=2, num_micro_batches=2))
        schedule 1f1b placement 0,1 micro_batches 2
        0: UNSHARD0 F0.0 SEND:x1.0>1 F0.1 SEND:x1.1>1 RECV:g0.0<1 B0.0 RECV:g0.1<1 B0.1 RESHARD0 REDUCE0 OPT
        1: RECV:x1.0<0 RECV:x1.1<0 UNSHARD1 F1.0 B1.0 SEND:g0.0>0 F1.1 B1.1 SEND:g0.1>0 RESHARD1 REDUCE1 OPT
    """
    if name not in ORDERS:
        raise ValueError(
            f"there is no schedule {name!r}{_did_you_mean(name)}; there are {', '.join(TRAINING)}; for evaluation, "
            "forward_only"
        )
    if num_ranks < 1 or num_micro_batches < 1:
        raise ValueError(f"at least one rank and one micro-batch; got {num_ranks} and {num_micro_batches}")
    fixed = ORDERS[name]
    fewest, most = fixed.chunks
    chunks = fewest if num_chunks is None else num_chunks
    if chunks < fewest or (most is not None and chunks > most):
        limits = str(fewest) if most == fewest else f"{fewest} or more" if most is None else f"{fewest} ... {most}"
        raise ValueError(f"{name} has {limits} stages on each rank; got num_chunks={chunks}")
    placement = fixed.placement(num_ranks, chunks)
    order = fixed.order(num_ranks, num_micro_batches, chunks)
    past = checked(skips, len(placement))
    made = lower(name, order, placement, num_micro_batches, costs or Costs.uniform(len(placement)), skips=past)
    validate(made)
    return made


def _did_you_mean(name: str) -> str:
    near = get_close_matches(name.casefold().replace("-", "_"), ORDERS, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def make_greedy_schedule(
    costs: Costs,
    *,
    num_ranks: int,
    num_micro_batches: int,
    placement: Sequence[int] | None = None,
    memory: Sequence[float] | None = None,
    skips: Iterable[tuple[int, int, str] | Skip] = (),
) -> Schedule:
    """Return a schedule made for measured costs; validated.

    No slower, by these costs, than the fixed ones with this placement that the memory allows. Backward passes are
    computed in halves, or whole, where that is faster by ``costs.backward``. Takes a second or two.

    Args:
        costs: Of each stage.
        num_ranks: Ranks of the pipeline.
        num_micro_batches: In one step.
        placement: The rank of each stage; None: round and round.
        memory: By rank, bytes that kept activations may take; None: ``num_ranks`` micro-batches of all stages of the
            rank, as 1F1B keeps.
        skips: As for :func:`make_schedule`.

    Raises:
        ValueError: Numbers that do not fit together.

    Example:
        >>> schedule = make_greedy_schedule(Costs.uniform(2), num_ranks=2, num_micro_batches=2)
        >>> [str(one) for one in schedule.rows[1] if one.op.value in "FIW"]
        ['F1.0', 'I1.0', 'F1.1', 'I1.1', 'W1.0', 'W1.1']
    """
    if costs.num_stages % num_ranks and placement is None:
        raise ValueError(f"{costs.num_stages} stages do not go round {num_ranks} ranks; say the placement")
    places = loop(num_ranks, costs.num_stages // num_ranks) if placement is None else tuple(placement)
    if len(places) != costs.num_stages or set(places) != set(range(num_ranks)):
        raise ValueError(
            f"placement needs a rank below {num_ranks} for each of {costs.num_stages} stages, and each rank a stage; "
            f"got {places}"
        )
    room = memory or [
        num_ranks * sum(costs.kept_bytes[stage] for stage, owner in enumerate(places) if owner == rank)
        for rank in range(num_ranks)
    ]
    past = checked(skips, len(places))
    fixed = fixed_orders(num_micro_batches, places, costs, room)
    orders = [best_order(num_micro_batches, places, costs, room, fixed, skips=past), *fixed]
    # what orders do not have counts here: messages that take turns, and gathers
    made = [lower("greedy", order, places, num_micro_batches, costs, skips=past) for order in orders]
    best = min(made, key=lambda schedule: simulate(schedule, costs).seconds)
    validate(best)
    return best


def evaluation_of(schedule: Schedule) -> Schedule:
    """Return the schedule of the same stages with forward passes only, in the same order; validated.

    Example:
        >>> print(evaluation_of(make_schedule("zb_v", num_ranks=1, num_micro_batches=1)))
        schedule zb_v:forward_only placement 0,0 micro_batches 1 forward_only
        0: UNSHARD0 F0.0 RESHARD0 UNSHARD1 F1.0 RESHARD1
    """
    order = [[Slot(one.op, one.stage, one.micro_batch) for one in row if one.op is Op.F] for row in schedule.rows]
    costs = Costs.uniform(schedule.num_stages)
    name, count = f"{schedule.name}:forward_only", schedule.num_micro_batches
    made = lower(name, order, schedule.placement, count, costs, skips=schedule.skips)
    validate(made)
    return made


def with_skips(
    schedule: Schedule, skips: Iterable[tuple[int, int, str] | Skip], *, costs: Costs | None = None
) -> Schedule:
    """Return a schedule that computes in the order of ``schedule``, with other skips; validated.

    Args:
        schedule: A valid one; its messages, gathers and reductions are made anew.
        skips: As for :func:`make_schedule`.
        costs: As there.

    Raises:
        ValueError: Skips that no pipeline has.

    Example:
        >>> schedule = make_schedule("gpipe", num_ranks=2, num_micro_batches=1)
        >>> print(with_skips(schedule, [(0, 1, "residual")]))
        schedule gpipe placement 0,1 micro_batches 1 skips 0>1:residual
        0: UNSHARD0 F0.0 SEND:x1.0>1 SEND:s1.0:residual>1 RECV:g0.0<1 RECV:t0.0:residual<1 B0.0 RESHARD0 REDUCE0 OPT
        1: RECV:x1.0<0 RECV:s1.0:residual<0 UNSHARD1 F1.0 B1.0 SEND:g0.0>0 SEND:t0.0:residual>0 RESHARD1 REDUCE1 OPT
    """
    order = [[Slot(one.op, one.stage, one.micro_batch) for one in row if one.op in COMPUTE] for row in schedule.rows]
    past, costs = checked(skips, schedule.num_stages), costs or Costs.uniform(schedule.num_stages)
    made = lower(schedule.name, order, schedule.placement, schedule.num_micro_batches, costs, skips=past)
    validate(made)
    return made


def halved(schedule: Schedule) -> Schedule:
    """Return a schedule that computes in the order of ``schedule``, each backward pass in two halves; validated.

    Args:
        schedule: A valid one; its messages, gathers and reductions are made anew.

    Example:
        >>> print(halved(make_schedule("gpipe", num_ranks=1, num_micro_batches=1)))
        schedule gpipe:halved placement 0 micro_batches 1
        0: UNSHARD0 F0.0 I0.0 W0.0 RESHARD0 REDUCE0 OPT
    """
    order = [
        halves(Slot(one.op, one.stage, one.micro_batch) for one in row if one.op in COMPUTE) for row in schedule.rows
    ]
    costs = Costs.uniform(schedule.num_stages)
    name, count = f"{schedule.name}:halved", schedule.num_micro_batches
    made = lower(name, order, schedule.placement, count, costs, skips=schedule.skips)
    validate(made)
    return made
