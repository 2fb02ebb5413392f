"""Times one AdamW step against torch's and DeepSpeed's, alternating in one process.

    python benchmarks/adamw.py --threads 1 2 --out adamw.md

Two tasks. ``float32``: parameter, gradient and both moments in float32 (28 bytes per element). ``mixed``:
gradients come and parameters go in bfloat16, the master and the moments are float32 (28 bytes in one pass).
Contenders take turns, each on memory of its own; ratios are medians of the ratios within one round, so that
slow minutes of a shared machine hit all alike. DeepSpeed's Adam takes part where it is installed; it compiles
itself at first use.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from ds_kernels import AdamConfig, AdamMaker, AdamW, CpuBackend
from torch import Tensor, nn

LR = 1e-4
MIN_SECONDS = 0.02  # of one sample; short steps are repeated to fill it


class Contender(NamedTuple):
    """One way to do a task."""

    name: str
    bytes_per_element: float  # read and written, each array counted once per pass
    step: Callable[[], object]


class Row(NamedTuple):
    """One contender's result."""

    task: str
    numel: int
    threads: int
    name: str
    median_ms: float
    min_ms: float
    gb_per_s: float
    ratio: float  # this contender's time over ours, median within rounds


class Shard(NamedTuple):
    """As a partitioner hands it to :class:`AdamMaker`."""

    master: nn.Parameter
    grad: Tensor
    copy: Tensor


def deepspeed_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """Return DeepSpeed's CPU Adam, compiled, or None where it is not installed."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    return DeepSpeedCPUAdam


# Tasks #


def weight(numel: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.randn(numel).to(dtype))
    param.grad = torch.randn(numel).mul_(1e-2).to(dtype)
    return param


def float32_task(numel: int, deepspeed: Callable[..., torch.optim.Optimizer] | None) -> Iterator[Contender]:
    yield Contender("ds-kernels", 28, AdamW([weight(numel)], lr=LR, kernels=CpuBackend()).step)
    yield Contender("torch fused", 28, torch.optim.AdamW([weight(numel)], lr=LR, fused=True).step)
    if deepspeed is not None:
        yield Contender("DeepSpeedCPUAdam", 28, deepspeed([weight(numel)], lr=LR).step)


def mixed_task(numel: int, deepspeed: Callable[..., torch.optim.Optimizer] | None) -> Iterator[Contender]:
    yield one_pass(numel)
    yield three_passes("cast, torch fused, copy", numel, lambda w: torch.optim.AdamW([w], lr=LR, fused=True))
    if deepspeed is not None:
        yield three_passes("cast, DeepSpeedCPUAdam, copy", numel, lambda w: deepspeed([w], lr=LR))
        # No master: the parameter itself is bfloat16, so small updates are lost. Less work, for comparison.
        no_master = deepspeed([weight(numel, torch.bfloat16)], lr=LR, fp32_optimizer_states=True)
        yield Contender("DeepSpeedCPUAdam, no master", 22, no_master.step)


def one_pass(numel: int) -> Contender:
    grad = torch.randn(numel).mul_(1e-2).bfloat16()
    shard = Shard(nn.Parameter(torch.randn(numel)), grad, torch.empty(numel, dtype=torch.bfloat16))
    maker = AdamMaker(AdamConfig(lr=LR), kernels=CpuBackend())
    optimizer = maker.make([{"params": [shard.master]}])
    return Contender("ds-kernels, one pass", 28, lambda: list(maker.update(optimizer, [[shard]], 1.0)))


def three_passes(name: str, numel: int, make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Contender:
    master = weight(numel)
    grad = master.grad.bfloat16()
    copy = torch.empty(numel, dtype=torch.bfloat16)
    optimizer = make(master)

    def step() -> None:
        master.grad.copy_(grad)
        optimizer.step()
        copy.copy_(master.detach())

    return Contender(name, 40, step)


def axpy(numel: int) -> Contender:
    """The yardstick: reads two arrays and writes one, in place."""
    x, y = torch.randn(numel), torch.randn(numel)
    return Contender("y.add_(x, alpha)", 12, lambda: y.add_(x, alpha=1e-3))


# Measuring #


def measure(task: str, contenders: list[Contender], numel: int, threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    repeats = {contender.name: repeats_of(contender) for contender in contenders}
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            samples[contender.name].append(sample(contender, repeats[contender.name]))
    ours = samples[contenders[0].name]
    return [
        Row(
            task,
            numel,
            threads,
            contender.name,
            1e3 * statistics.median(times),
            1e3 * min(times),
            contender.bytes_per_element * numel / statistics.median(times) / 1e9,
            statistics.median(time / our for time, our in zip(times, ours)),
        )
        for contender in contenders
        for times in [samples[contender.name]]
    ]


def repeats_of(contender: Contender) -> int:
    contender.step()  # makes the state, touches the memory
    return max(1, round(MIN_SECONDS / sample(contender, 1)))


def sample(contender: Contender, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        contender.step()
    return (time.perf_counter() - start) / repeats


# Report #


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def header(rounds: int) -> list[str]:
    """Return what a report begins with: title, machine, command, and the table's head."""
    versions = ", ".join(installed(name) for name in ("ds-kernels", "torch", "deepspeed"))
    return [
        f"# One AdamW step on a CPU, {date.today()}",
        "",
        f"{versions}; {processor()}; torch runs {torch.backends.cpu.get_cpu_capability()}.",
        f"{rounds} rounds, contenders alternating in one process; load average {os.getloadavg()[0]:.1f}.",
        "`ratio` is a contender's time over that of ds-kernels: above 1, ds-kernels is faster. GB/s count",
        "each array once per pass; `y.add_` is the yardstick of what memory gives.",
        f"`python {' '.join(sys.argv)}`",
        "",
        "| task | elements | threads | contender | median ms | min ms | GB/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]


def line(row: Row) -> str:
    return (
        f"| {row.task} | {row.numel / 1e6:g} M | {row.threads} | {row.name} | {row.median_ms:.2f} "
        f"| {row.min_ms:.2f} | {row.gb_per_s:.1f} | {row.ratio:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 25e6, 50e6], help="elements")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    deepspeed = deepspeed_adam()
    rows = []
    for numel in map(int, args.sizes):
        for task, make in (("float32", float32_task), ("mixed", mixed_task)):
            contenders = [*make(numel, deepspeed), axpy(numel)]
            for threads in args.threads:
                rows += measure(task, contenders, numel, threads, args.rounds)
                print("\n".join(map(line, rows[-len(contenders) :])), flush=True)
    report = "\n".join([*header(args.rounds), *map(line, rows)])
    print(report)
    if args.out is not None:
        args.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
