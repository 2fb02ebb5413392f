"""One rank of the benchmark: all contenders, one after the other, round by round."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ds_pipe import simulate
from ds_pipe.host_memory import keep_freed_memory

from . import contenders as made
from .contenders import FIXED, RANKS, TORCH, Contender
from .work import Work

OTHERS = 0.1  # processors that others may use during a sample that counts
FEW = 3  # samples
WARM_UP = 2  # steps, for whose costs the greedy schedule is made


class Sample(NamedTuple):
    """One step between two barriers, on one rank."""

    seconds: float
    computing: float
    run: float  # seconds of the schedule, without the optimizer
    own: float  # seconds of the processor that this process took
    machine: float  # that all processes took
    faults: int  # pages of memory that the system gave to this process


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return, by contender, what was measured on this rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.keep_freed:
        keep_freed_memory()
    dist.init_process_group("gloo", init_method="env://")
    work = Work.of(options)
    blocks = work.blocks()
    alive = {"floor": made.floor(work, blocks)}
    alive |= {name: made.fixed(work, blocks, name) for name in FIXED if _wanted(name, options)}
    alive |= {name: made.torchs(work, blocks, *how) for name, how in TORCH.items() if _wanted(name, options)}
    if _wanted("DeepSpeed", options):
        alive["DeepSpeed 1F1B"] = made.deepspeed(work)
    if _wanted("DDP", options):
        alive["DDP"] = made.ddp(work, work.blocks())
    alive["greedy"] = made.ours(work, blocks, made.greedy(work, blocks, WARM_UP))
    found: dict[str, list[Sample]] = {name: [] for name in alive}
    for contender in alive.values():
        contender.step()
        if contender.ours is not None:
            contender.ours.reset()
    order, until = random.Random(0), time.monotonic() + options.seconds
    while len(found["floor"]) < 2 or _both(time.monotonic() < until):
        for name in order.sample(list(alive), len(alive)):
            found[name].append(_sample(alive[name]))
    costs = made.costs_of(alive["greedy"], work)
    floor = [sample.seconds for sample in found["floor"]]
    return {name: _row(name, contender, found[name], work, floor) for name, contender in alive.items()} | {
        "link": (costs.latency, costs.bytes_per_second),
        "numel": sum(param.numel() for block in blocks for param in block.parameters()),
    }


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return any(part in name for part in options.contenders)


def _sample(contender: Contender) -> Sample:
    computed = _busy(contender)
    dist.barrier()
    faults, machine, own, start = _faults(), _machine_seconds(), time.process_time(), time.perf_counter()
    contender.step()
    dist.barrier()
    seconds, own, machine = time.perf_counter() - start, time.process_time() - own, _machine_seconds() - machine
    run = contender.ours.run_seconds[-1] if contender.ours is not None else 0.0
    return Sample(seconds, _busy(contender) - computed, run, own, machine, _faults() - faults)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _machine_seconds() -> float:
    """Return the seconds for which processors of this machine have worked, for whomever, since it started."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _quiet(samples: list[tuple[Sample, ...]]) -> list[tuple[Sample, ...]]:
    """Return those samples of both ranks during which the machine did little else, or if there are few, the best."""

    def others(pair: tuple[Sample, ...]) -> float:
        first = pair[0]
        return (first.machine - sum(each.own for each in pair)) / first.seconds

    best = sorted(samples, key=others)
    quiet = [pair for pair in best if others(pair) < OTHERS]
    return quiet if len(quiet) >= FEW else best[:FEW]


def _busy(contender: Contender) -> float:
    """Return seconds of computing so far."""
    return 0.0 if contender.ours is None else contender.ours.times.computing


def _both(value: bool) -> bool:
    flag = torch.tensor(float(value))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _row(name: str, contender: Contender, samples: list[Sample], work: Work, floor: Sequence[float]) -> dict[str, Any]:
    both: list[Any] = [None] * RANKS
    dist.all_gather_object(both, samples)
    rounds = list(zip(*both, strict=True))
    pairs = _quiet(rounds)
    row: dict[str, Any] = {
        "seconds": [pair[0].seconds for pair in pairs],
        "of floor": [pair[0].seconds / least for pair, least in zip(rounds, floor, strict=True) if pair in pairs],
        "faults": statistics.median(max(each.faults for each in pair) for pair in pairs),
    }
    if contender.ours is None:
        return row
    schedule = contender.ours.pipeline.schedule
    measured = [1 - sum(each.computing for each in pair) / (RANKS * max(each.run for each in pair)) for pair in pairs]
    timeline = simulate(schedule, made.costs_of(contender, work))
    return row | {
        "measured bubble": statistics.median(measured),
        "simulated bubble": timeline.bubble_share,
        "simulated seconds": timeline.seconds,
        "schedule": str(schedule) if name == "greedy" else "",
    }


def run(options: argparse.Namespace) -> None:
    """Measure, and print it as JSON."""
    print(json.dumps(measure(options)), flush=True)
