"""The contenders: each gives a function that does one training step on this rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ds_pipe import Costs, Pipeline, Schedule, make_greedy_schedule, make_schedule, simulate
from ds_pipe.build import halved
from ds_pipe.orders import loop, vee
from ds_pipe.times import Times
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn import functional

from .work import LR, MICRO_BATCHES, Work

RANKS = 2


class Ours:
    """A pipeline of ds-pipe, and what its steps took since the last reset."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.reset()

    def reset(self) -> None:
        self.times = Times()
        self.run_seconds: list[float] = []  # of each step, without the optimizer

    def run(self, inputs: list[Tensor], targets: list[Tensor]) -> None:
        start = time.perf_counter()
        self.pipeline.run(inputs, targets, times=self.times)
        self.run_seconds.append(time.perf_counter() - start)


class Contender(NamedTuple):
    step: Callable[[], None]
    ours: Ours | None = None


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def ours(work: Work, blocks: list[nn.Module], schedule: Schedule) -> Contender:
    rank, stages = dist.get_rank(), work.cut(blocks, schedule.num_stages)
    own = {index: stages[index] for index in schedule.stages_of(rank)}
    made = Ours(Pipeline(schedule, own, dist.group.WORLD, loss=functional.mse_loss))
    optimizer, (inputs, targets) = _sgd(nn.ModuleList(own.values()).parameters()), work.batches()

    def step() -> None:
        made.run(inputs, targets)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, made)


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


def greedy(work: Work, blocks: list[nn.Module], steps: int) -> Schedule:
    """Return the best schedule for what ``steps`` steps of this very run have cost.

    As ``pipeline.replan`` does, but for three pipelines, which have all placements there are of four parts and of two
    pairs. Memory is that of GPipe, which is among the others.
    """
    timed = []
    for name in ("zb_v", "interleaved", "1f1b"):
        plain = fixed(work, blocks, name)
        timed.append((plain, ours(work, blocks, halved(_ours(plain).pipeline.schedule))))
    for number in range(1 + steps):
        for pair in timed:
            for contender in pair:
                contender.step()
                if not number:
                    _ours(contender).reset()
    made = []
    for plain, split in timed:
        _ours(split).times.add(_ours(plain).times)
        costs = costs_of(split, work)
        schedule = _ours(plain).pipeline.schedule
        room = [MICRO_BATCHES * sum(costs.kept_bytes)] * RANKS
        best = make_greedy_schedule(
            costs, num_ranks=RANKS, num_micro_batches=MICRO_BATCHES, placement=schedule.placement, memory=room
        )
        made.append((simulate(best, costs).seconds, best))
    return min(made, key=lambda entry: entry[0])[1]


def costs_of(contender: Contender, work: Work) -> Costs:
    """Return what the steps of one of ours have cost."""
    costs = _ours(contender).pipeline.costs(_ours(contender).times)
    return replace(costs, message_bytes=(4.0 * work.tokens * work.dim,) * costs.num_stages)


def _ours(contender: Contender) -> Ours:
    assert contender.ours is not None, "a contender of another library"
    return contender.ours


FIXED = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zb_v")
TORCH = {
    "torch GPipe": (pipelining.ScheduleGPipe, loop(RANKS)),
    "torch 1F1B": (pipelining.Schedule1F1B, loop(RANKS)),
    "torch Interleaved1F1B": (pipelining.ScheduleInterleaved1F1B, loop(RANKS, 2)),
    "torch ZBVZeroBubble": (pipelining.ScheduleZBVZeroBubble, vee(RANKS)),
}


def fixed(work: Work, blocks: list[nn.Module], name: str) -> Contender:
    return ours(work, blocks, make_schedule(name, num_ranks=RANKS, num_micro_batches=MICRO_BATCHES))
