"""The contenders: each gives a function that does one training step on this rank."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ds_pipe import Costs, Pipeline, Schedule, make_greedy_schedule, make_schedule, simulate
from ds_pipe.orders import loop, vee
from torch import nn
from torch.distributed import pipelining
from torch.nn import functional

from .work import LR, MICRO_BATCHES, Work

RANKS = 2


class Contender(NamedTuple):
    step: Callable[[], None]
    schedule: Schedule | None = None  # ours
    timers: dict[tuple[str, int], list[float]] | None = None  # ours: seconds by operation and stage, and of runs


class _Timed:
    """Stands for a stage and notes how long its computations take."""

    def __init__(self, stage: Any, index: int, timers: dict[tuple[str, int], list[float]]) -> None:
        self._stage, self._index, self._timers = stage, index, timers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("F", self._stage.forward, *args, **kwargs)

    def backward(self, *args: Any) -> Any:
        return self._call("I", self._stage.backward, *args)

    def settle(self, *args: Any) -> Any:
        return self._call("W", self._stage.settle, *args)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = function(*args, **kwargs)
        self._timers[name, self._index].append(time.perf_counter() - start)
        return found


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def ours(work: Work, blocks: list[nn.Module], schedule: Schedule) -> Contender:
    rank, stages = dist.get_rank(), work.cut(blocks, schedule.num_stages)
    own = {index: stages[index] for index in schedule.stages_of(rank)}
    pipeline = Pipeline(schedule, own, dist.group.WORLD, loss=functional.mse_loss)
    timers: dict[tuple[str, int], list[float]] = defaultdict(list)
    for index, stage in pipeline._stages.items():
        pipeline._stages[index] = _Timed(stage, index, timers)  # type: ignore[assignment]
    optimizer, (inputs, targets) = _sgd(nn.ModuleList(own.values()).parameters()), work.batches()

    def step() -> None:
        start = time.perf_counter()
        pipeline.run(inputs, targets)
        timers["run", -1].append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, schedule, timers)


def torchs(work: Work, blocks: list[nn.Module], kind: Any, placement: tuple[int, ...]) -> Contender:
    """torch.distributed.pipelining."""
    rank, stages = dist.get_rank(), work.cut(blocks, len(placement))
    own = [index for index, owner in enumerate(placement) if owner == rank]
    made = [
        pipelining.PipelineStage(stages[index], index, len(placement), torch.device("cpu"), group=dist.group.WORLD)
        for index in own
    ]
    single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
    schedule = kind(made[0] if single else made, MICRO_BATCHES, loss_fn=functional.mse_loss)
    params = [param for index in own for param in stages[index].parameters()]
    optimizer = _sgd(params)
    inputs, targets = (torch.cat(each) for each in work.batches())

    def step() -> None:
        schedule.step(*([inputs] if 0 in own else []), target=targets if len(placement) - 1 in own else None)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step)


def deepspeed(work: Work) -> Contender:
    """DeepSpeed's PipelineEngine: 1F1B."""
    import deepspeed as ds

    ds.init_distributed("gloo", verbose=False)
    logging.disable(logging.CRITICAL)
    stages = [part for stage in work.cut(work.blocks(), len(work.parts)) for part in [stage]]
    model = ds.pipe.PipelineModule(stages, num_stages=RANKS, loss_fn=functional.mse_loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = ds.initialize(model=model, optimizer=_sgd(model.parameters()), config=config)
    inputs, targets = work.batches()

    def step() -> None:
        engine.train_batch(iter(zip(inputs, targets, strict=True)))

    return Contender(step)


def floor(work: Work, blocks: list[nn.Module]) -> Contender:
    """Every rank trains its half of the layers alone, on given inputs, both at once: nothing to wait for."""
    rank, parts = dist.get_rank(), work.cut(blocks, len(work.parts))
    own = [part for part, owner in zip(parts, vee(RANKS), strict=True) if owner == rank]
    optimizer = _sgd(nn.ModuleList(own).parameters())
    inputs, targets = work.batches()

    def step() -> None:
        for part in own:
            for given, target in zip(inputs, targets, strict=True):
                out = part(given.requires_grad_())
                (functional.mse_loss(out, target) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step)


def ddp(work: Work, blocks: list[nn.Module]) -> Contender:
    """DistributedDataParallel on the same global batch: half of the micro-batches on each rank, one all-reduce."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*blocks), gradient_as_bucket_view=True, init_sync=False)
    optimizer, (inputs, targets) = _sgd(model.parameters()), work.batches()
    mine = list(zip(inputs, targets, strict=True))[dist.get_rank() :: RANKS]

    def step() -> None:
        for index, (given, target) in enumerate(mine):
            model.require_backward_grad_sync = index == len(mine) - 1
            (functional.mse_loss(model(given), target) / len(mine)).backward()
        optimizer.step()
        model.zero_grad(set_to_none=False)

    return Contender(step)


def greedy(costs: Costs) -> Schedule:
    """Return the best for these four stages, by simulation: both placements, and pairs of them as two stages.

    Memory is that of GPipe, which is among the others.
    """
    room = [MICRO_BATCHES * sum(costs.kept_bytes)] * RANKS
    made = [
        (
            make_greedy_schedule(
                costs, num_ranks=RANKS, num_micro_batches=MICRO_BATCHES, placement=placement, memory=room
            ),
            costs,
        )
        for placement in (loop(RANKS, 2), vee(RANKS))
    ]
    pairs = paired(costs)
    made.append((make_greedy_schedule(pairs, num_ranks=RANKS, num_micro_batches=MICRO_BATCHES, memory=room), pairs))
    return min(made, key=lambda entry: simulate(*entry).seconds)[0]


def paired(costs: Costs) -> Costs:
    """Return the costs of stages two by two."""

    def added(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[index] + values[index + 1] for index in range(0, len(values), 2))

    return Costs(
        forward=added(costs.forward),
        input_grad=added(costs.input_grad),
        weight_grad=added(costs.weight_grad),
        kept_bytes=added(costs.kept_bytes),
        message_bytes=costs.message_bytes[::2],
        latency=costs.latency,
        bytes_per_second=costs.bytes_per_second,
    )


FIXED = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zb_v")
TORCH = {
    "torch GPipe": (pipelining.ScheduleGPipe, loop(RANKS)),
    "torch 1F1B": (pipelining.Schedule1F1B, loop(RANKS)),
    "torch Interleaved1F1B": (pipelining.ScheduleInterleaved1F1B, loop(RANKS, 2)),
    "torch ZBVZeroBubble": (pipelining.ScheduleZBVZeroBubble, vee(RANKS)),
}


def fixed(work: Work, blocks: list[nn.Module], name: str) -> Contender:
    return ours(work, blocks, make_schedule(name, num_ranks=RANKS, num_micro_batches=MICRO_BATCHES))
