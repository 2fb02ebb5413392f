"""A pipeline of three ranks, one of which is in trouble: ``troubled_program.py WHAT RANK``.

Prints what ``Pipeline.run`` raises. No rank ends before all have, unless it is killed: so none misses the store.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from ds_pipe import LayerSpec, Pipeline, PipelineModule, Schedule, make_schedule
from ds_pipe.config import PipeConfig
from ds_pipe.pipeline import Whole
from ds_pipe.plugin import PipeBuilder
from torch import Tensor, nn

WIDTH, MICRO_BATCHES, TROUBLED = 4, 4, 2  # micro-batch


class Layer(nn.Module):
    """Linear; in the second step the troubled rank's is in trouble at one micro-batch."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.what = what
        self.calls = 0

    def forward(self, value: Tensor) -> object:
        if self.calls == MICRO_BATCHES + TROUBLED:
            self.trouble()
        self.calls += 1
        return object() if self.what == "odd" else self.linear(value)

    def trouble(self) -> None:
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "raise":
            raise ArithmeticError("the answer is not 42")
        if self.what == "hang":  # until the others have given up
            others = [f"gave up/{rank}" for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
            store().wait(others, timedelta(seconds=50))


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


class Batches(NamedTuple):
    inputs: list[Tensor]
    targets: list[Tensor]
    keys: range


def train_described(schedule: Schedule, num_layers: int, batches: Batches) -> None:
    described = PipelineModule(
        [LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(num_layers)], loss_fn=nn.functional.mse_loss
    )
    builder = PipeBuilder(lambda _ranks, _count: schedule, bounds=None, config=PipeConfig(timeout=40.0))
    stages = builder.cut(described, rank=dist.get_rank(), num_ranks=schedule.num_ranks, num_micro_batches=MICRO_BATCHES)
    stages.connect(dist.group.WORLD, Whole(), seed=0).train(batches, scale=1.0)


def main() -> None:
    what, troubled = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method="env://")
    rank, size = dist.get_rank(), dist.get_world_size()
    in_trouble = rank == troubled
    count = MICRO_BATCHES + (what == "count" and in_trouble)
    schedule = make_schedule("1f1b", num_ranks=size, num_micro_batches=count)
    layer = Layer(what if in_trouble else "")
    timeout = timedelta(seconds=2 if what == "hang" else 40)
    pipeline = Pipeline(schedule, {rank: layer}, dist.group.WORLD, loss=nn.functional.mse_loss, timeout=timeout)
    for step in range(2):
        inputs = [torch.ones(2, WIDTH)] * count
        if in_trouble and step == 1 and what == "shape":
            inputs[TROUBLED] = torch.ones(2, WIDTH + 1)
        if in_trouble and step == 1 and what == "few":
            inputs.pop()
        try:
            targets = [torch.zeros(2, WIDTH)] * count
            if what == "model":
                train_described(schedule, size + in_trouble, Batches(inputs, targets, range(count)))
            else:
                pipeline.run(inputs, targets)
        except (RuntimeError, ValueError) as error:
            sys.stdout.write(f"{type(error).__name__} {error}\n")
            sys.stdout.flush()
            break
    store().set(f"gave up/{rank}", "")
    if what != "kill":
        store().wait([f"gave up/{other}" for other in range(size)], timedelta(seconds=50))
        store().set(f"end/{rank}", "")
        if rank == 0:
            store().wait([f"end/{other}" for other in range(size)], timedelta(seconds=50))
    os._exit(0)  # destroying a group whose connections are closed may wait


main()
