"""What running a schedule costs beside the computations: microseconds for each instruction.

    python benchmarks/overhead.py --out overhead.md

Modules do next to nothing. *own*: a step's time without that in stages (torch's forward and backward passes). *with
messages*: on two ranks, without the time spent waiting for messages; gloo's sends and receives are in it. Medians over
steps, in one process each and two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ds_pipe import Pipeline, make_schedule
from torch import Tensor, nn

MICRO_BATCHES = 64
NAMES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zb_v")


class Scale(nn.Module):
    """One number times the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.weight


class Clock:
    """Adds up the time spent in calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return found

        return timed


def measure(name: str, rank: int, group: dist.ProcessGroup | None, steps: int) -> tuple[int, float]:
    """Return the number of this rank's instructions and the microseconds that each costs."""
    size = 1 if group is None else dist.get_world_size(group)
    schedule = make_schedule(name, num_ranks=size, num_micro_batches=MICRO_BATCHES)
    own = {stage: Scale() for stage in schedule.stages_of(rank)}
    pipeline = Pipeline(schedule, own, group, loss=lambda out, _target: out.sum())
    clock = Clock()
    for stage in pipeline._stages.values():
        for method in ("forward", "backward", "settle"):
            setattr(stage, method, clock.around(getattr(stage, method)))
    if pipeline._messages is not None:
        pipeline._messages._wait = clock.around(pipeline._messages._wait)
    batches = [torch.ones(2) for _ in range(MICRO_BATCHES)]
    found = []
    for _ in range(steps):
        before, start = clock.seconds, time.perf_counter()
        pipeline.run(batches, batches)
        found.append(time.perf_counter() - start - (clock.seconds - before))
    count = len(schedule.rows[rank])
    return count, statistics.median(found[2:]) / count * 1e6


def serve(rank: int, store: str, steps: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    for name in NAMES:
        found = measure(name, rank, dist.group.WORLD, steps)
        if rank == 0:
            results.put((name, *found))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="Markdown file to which the table is appended")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: Any = mp.get_context("spawn").SimpleQueue()
    store = os.path.join(tempfile.mkdtemp(), "store")
    mp.spawn(serve, (store, options.steps, results), nprocs=2)
    both = {name: (count, cost) for name, count, cost in (results.get() for _ in NAMES)}
    lines = [
        "| schedule | instructions, 1 rank | own (us each) | instructions, 2 ranks | with messages (us each) |",
        "|---|---|---|---|---|",
    ]
    for name in NAMES:
        count, cost = measure(name, 0, None, options.steps)
        lines.append(f"| {name} | {count} | {cost:.1f} | {both[name][0]} | {both[name][1]:.1f} |")
    text = "\n".join(lines)
    print(text)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
