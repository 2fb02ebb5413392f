"""One rank of the benchmark: all contenders, one after the other, round by round."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ds_pipe import Costs, simulate
from torch import Tensor

from . import contenders as made
from .contenders import FIXED, RANKS, TORCH, Contender
from .work import Work

OTHERS = 0.1  # processors that others may use during a sample that counts
FEW = 3  # samples


class Sample(NamedTuple):
    """One step between two barriers, on one rank."""

    seconds: float
    computing: float
    run: float  # seconds of the schedule, without the optimizer
    own: float  # seconds of the processor that this process took
    machine: float  # that all processes took


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return, by contender, what was measured on this rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    work = Work.of(options)
    blocks = work.blocks()
    link = _link(work)
    alive = {"floor": made.floor(work, blocks)}
    alive |= {name: made.fixed(work, blocks, name) for name in FIXED if _wanted(name, options)}
    alive |= {name: made.torchs(work, blocks, *how) for name, how in TORCH.items() if _wanted(name, options)}
    if _wanted("DeepSpeed", options):
        alive["DeepSpeed 1F1B"] = made.deepspeed(work)
    if _wanted("DDP", options):
        alive["DDP"] = made.ddp(work, work.blocks())
    profiled = made.fixed(work, blocks, "zb_v")
    for _ in range(3):
        profiled.step()
    alive["greedy"] = made.ours(work, blocks, made.greedy(_costs(profiled, work, link)))
    found: dict[str, list[Sample]] = {name: [] for name in alive}
    for contender in alive.values():
        contender.step()
        _reset(contender)
    order, until = random.Random(0), time.monotonic() + options.seconds
    while len(found["floor"]) < 2 or _both(time.monotonic() < until):
        for name in order.sample(list(alive), len(alive)):
            found[name].append(_sample(alive[name]))
    return {name: _row(name, contender, found[name], work, link) for name, contender in alive.items()} | {
        "link": link,
        "numel": sum(param.numel() for block in blocks for param in block.parameters()),
    }


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return any(part in name for part in options.contenders)


def _sample(contender: Contender) -> Sample:
    computed = _busy(contender)
    dist.barrier()
    machine, own, start = _machine_seconds(), time.process_time(), time.perf_counter()
    contender.step()
    dist.barrier()
    seconds, own, machine = time.perf_counter() - start, time.process_time() - own, _machine_seconds() - machine
    run = contender.timers["run", -1][-1] if contender.timers else 0.0
    return Sample(seconds, _busy(contender) - computed, run, own, machine)


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
    return sum(sum(times) for (name, _), times in (contender.timers or {}).items() if name != "run")


def _reset(contender: Contender) -> None:
    if contender.timers is not None:
        contender.timers.clear()


def _both(value: bool) -> bool:
    flag = torch.tensor(float(value))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _row(
    name: str, contender: Contender, samples: list[Sample], work: Work, link: tuple[float, float]
) -> dict[str, Any]:
    both: list[Any] = [None] * RANKS
    dist.all_gather_object(both, samples)
    pairs = _quiet(list(zip(*both, strict=True)))
    row: dict[str, Any] = {"seconds": [pair[0].seconds for pair in pairs]}
    if contender.schedule is None:
        return row
    measured = [1 - sum(each.computing for each in pair) / (RANKS * max(each.run for each in pair)) for pair in pairs]
    timeline = simulate(contender.schedule, _costs(contender, work, link))
    return row | {
        "measured bubble": statistics.median(measured),
        "simulated bubble": timeline.bubble_share,
        "simulated seconds": timeline.seconds,
        "schedule": str(contender.schedule) if name == "greedy" else "",
    }


def _costs(contender: Contender, work: Work, link: tuple[float, float]) -> Costs:
    """Return the costs of the stages as measured on all ranks."""
    mine = {f"{op}{stage}": statistics.median(times) for (op, stage), times in (contender.timers or {}).items()}
    all_of_them: list[Any] = [None] * RANKS
    dist.all_gather_object(all_of_them, mine)
    known = {key: value for each in all_of_them for key, value in each.items()}
    assert contender.schedule is not None
    stages = range(contender.schedule.num_stages)
    each = len(work.parts) // len(stages)
    return Costs(
        forward=tuple(known[f"F{stage}"] for stage in stages),
        input_grad=tuple(known[f"I{stage}"] for stage in stages),
        weight_grad=tuple(known[f"W{stage}"] for stage in stages),
        kept_bytes=tuple(float(sum(work.parts[stage * each : (stage + 1) * each])) for stage in stages),
        message_bytes=tuple(4.0 * work.tokens * work.dim for _ in stages),
        latency=link[0],
        bytes_per_second=link[1],
    )


def _link(work: Work) -> tuple[float, float]:
    """Return the latency of a small message and the speed of one as large as a micro-batch."""
    small, large = (statistics.median(_one_way(size) for _ in range(7)) for size in (16, work.tokens * work.dim))
    found = [(small, 4 * work.tokens * work.dim / max(large - small, 1e-9))]
    dist.broadcast_object_list(found)  # all ranks make the same schedule of it
    return found[0]


def _one_way(numel: int) -> float:
    buffer = torch.zeros(numel)
    dist.barrier()
    start = time.perf_counter()
    for sender in range(RANKS):
        _pass(buffer, sender)
    return (time.perf_counter() - start) / RANKS


def _pass(buffer: Tensor, sender: int) -> None:
    if dist.get_rank() == sender:
        dist.send(buffer, 1 - sender)
    else:
        dist.recv(buffer, sender)


def run(options: argparse.Namespace) -> None:
    """Measure, and print it as JSON."""
    print(json.dumps(measure(options)), flush=True)
