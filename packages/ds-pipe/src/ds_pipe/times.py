"""What the steps of a pipeline cost, noted while they run, and put together over all ranks.

[Note: Trips]
A sender puts its clock into each message, and a receiver that waits for one reads its own as it comes. Clocks differ,
but by as much in one direction as, with the other sign, in the other: the mean of both directions is what a message
takes. Since when a message has been there that nobody waits for is not known; those do not count. So the figure is
that of messages among computations: threads that move them wait for a processor, which on an idle machine they do not.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from .costs import Costs
from .instruction import COMPUTE, Instruction, Op
from .keeping import keeping
from .link import Link, link_between
from .messages import Traffic


class Times:
    """How long each operation of this rank's stages takes, in the steps that are given it; see ``Pipeline.run``.

    Steps of several schedules may be noted, if they have the same stages on the same ranks: where one computes whole
    backward passes and another one their halves, both are known.

    Example:
        >>> import torch
        >>> from .build import make_schedule
        >>> from .pipeline import Pipeline
        >>> schedule = make_schedule("zb_h1", num_ranks=1, num_micro_batches=2)
        >>> pipeline = Pipeline(schedule, {0: nn.Linear(2, 1)}, None, loss=nn.functional.mse_loss)
        >>> times = Times()
        >>> losses = pipeline.run([torch.ones(4, 2)] * 2, [torch.zeros(4, 1)] * 2, times=times)
        >>> costs = pipeline.costs(times)
        >>> costs.num_stages, costs.kept_bytes, costs.forward[0] > 0
        (1, (64.0,), True)
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[Op, int], list[float]] = defaultdict(list)
        """By operation and stage, without waiting for messages; UNSHARD among them."""
        self._trips: dict[int, list[float]] = defaultdict(list)  # by peer
        self._nbytes: dict[str, float] = {}  # of messages, named as in Traffic
        self._kept: dict[int, float] = {}  # by stage

    @property
    def computing(self) -> float:
        """Seconds of all computations so far."""
        return sum(sum(each) for (op, _), each in self.seconds.items() if op in COMPUTE)

    def note(self, one: Instruction, seconds: float) -> None:
        """Note what one instruction took."""
        if one.op in COMPUTE or one.op is Op.UNSHARD:
            self.seconds[one.op, one.stage].append(seconds)

    def note_traffic(self, traffic: Traffic) -> None:
        """Note the messages of one step."""
        self._nbytes.update(traffic.nbytes)
        for trip in traffic.trips:
            self._trips[trip.peer].append(trip.seconds)

    def add(self, other: Times) -> None:
        """Take over what ``other`` has noted, of a pipeline with the same placement."""
        for key, seconds in other.seconds.items():
            self.seconds[key] += seconds
        for peer, trips in other._trips.items():
            self._trips[peer] += trips
        self._nbytes.update(other._nbytes)
        self._kept.update(other._kept)

    def around(
        self, modules: Mapping[int, nn.Module], inner: Callable[[int, int], AbstractContextManager[None]]
    ) -> Callable[[int, int], AbstractContextManager[None]]:
        """Return what is entered around forward passes: ``inner``, and a count of what the first micro-batch keeps."""

        @contextmanager
        def counting(stage: int, micro_batch: int) -> Iterator[None]:
            with inner(stage, micro_batch), keeping(modules[stage], set()) as kept:
                yield
            self._kept[stage] = max(self._kept.get(stage, 0.0), kept.nbytes)

        def entered(stage: int, micro_batch: int) -> AbstractContextManager[None]:
            return inner(stage, micro_batch) if micro_batch else counting(stage, micro_batch)

        return entered

    def costs(self, num_stages: int, group: dist.ProcessGroup | None) -> Costs:
        """Return the costs of all stages, on all ranks the same; all ranks call it. See ``Pipeline.costs``."""
        mine = _Found(
            {op.value: {stage: statistics.median(each) for (o, stage), each in self.seconds.items() if o is op}
             for op in (Op.F, Op.B, Op.I, Op.W, Op.UNSHARD)},
            self._nbytes,
            self._kept,
            {peer: statistics.median(each) for peer, each in self._trips.items()},
        )  # fmt: skip
        if group is None:
            return _assembled([mine], num_stages, Link(0.0, float("inf")))
        rows: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(rows, mine, group=group)
        sizes = [nbytes for row in rows for nbytes in row.nbytes.values() if nbytes]
        return _assembled(rows, num_stages, link_between(group, int(statistics.median(sizes)) if sizes else 0))


class _Found(NamedTuple):
    """What one rank knows; see :class:`Times`."""

    seconds: Mapping[str, Mapping[int, float]]
    nbytes: Mapping[str, float]
    kept: Mapping[int, float]
    trips: Mapping[int, float]


def _assembled(rows: Sequence[_Found], num_stages: int, link: Link) -> Costs:
    stages = range(num_stages)
    seconds = {op: {k: v for row in rows for k, v in row.seconds[op].items()} for op in rows[0].seconds}
    forward, whole, halves, rest = (seconds[op.value] for op in (Op.F, Op.B, Op.I, Op.W))
    missing = [s for s in stages if s not in forward or not (s in whole or (s in halves and s in rest))]
    if missing:
        raise ValueError(
            f"no step of the stages {missing} was timed: pass times= to Pipeline.run, on all ranks, in one that trains"
        )
    nbytes = {name: size for row in rows for name, size in row.nbytes.items()}
    kept = {stage: size for row in rows for stage, size in row.kept.items()}
    return Costs(
        forward=tuple(forward[stage] for stage in stages),
        input_grad=tuple(halves.get(stage, whole.get(stage, 0.0) / 2) for stage in stages),
        weight_grad=tuple(rest.get(stage, whole.get(stage, 0.0) / 2) for stage in stages),
        backward=tuple(whole[stage] for stage in stages) if len(whole) == num_stages else (),
        kept_bytes=tuple(kept.get(stage, 0.0) for stage in stages),
        message_bytes=tuple(nbytes.get(f"x{stage}", 0.0) for stage in stages),
        latency=max(link.latency, _latency(rows, nbytes, link)),
        bytes_per_second=link.bytes_per_second,
        unshard=max([0.0, *seconds[Op.UNSHARD.value].values()]),
        skip_bytes={name[:-1]: size for name, size in nbytes.items() if name.endswith(":")},
    )


def _latency(rows: Sequence[_Found], nbytes: Mapping[str, float], link: Link) -> float:
    """Return what messages took among computations, less what their bytes take; see [Note: Trips]."""
    size = statistics.median([size for size in nbytes.values() if size] or [0.0])
    found = [
        (seconds + rows[peer].trips[rank]) / 2 - size / link.bytes_per_second
        for rank, row in enumerate(rows)
        for peer, seconds in row.trips.items()
        if rank in rows[peer].trips
    ]
    return statistics.median(found) if found else 0.0
