"""Measures the loss over a vocabulary, forward and backward: memory and time beside torch, eager and compiled.

    python benchmarks/linear_cross_entropy.py --out linear_cross_entropy.md

Memory is the growth of the process's peak of resident memory (VmHWM, reset before) over forward and backward, each
contender in a process of its own: gradients of hidden states and weight and all that the libraries take for themselves
are in it, operands are not. For time, contenders take turns in one process; ratios are medians of the ratios within a
round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from ds_kernels.ops import linear_cross_entropy
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight), target)


CONTENDERS: Mapping[str, Callable[[], Loss]] = MappingProxyType(
    {
        "ds-kernels": lambda: linear_cross_entropy,
        "torch": lambda: plain,
        "torch.compile": lambda: torch.compile(plain, dynamic=False),
    }
)


class Size(NamedTuple):
    """Of the problem."""

    tokens: int
    vocabulary: int
    features: int
    dtype: str


class Row(NamedTuple):
    """One contender's result."""

    dtype: str
    name: str
    peak_mib: float
    median_s: float
    memory_ratio: float  # this contender's peak over ours
    time_ratio: float  # this contender's time over ours


def operands(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, size.dtype)
    hidden = torch.randn(size.tokens, size.features).to(dtype).requires_grad_()
    weight = (torch.randn(size.vocabulary, size.features) / size.features**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(size.vocabulary, (size.tokens,))


def step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight, target).backward()


# Memory #


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_growth(name: str, size: Size) -> int:
    """Return the bytes by which the peak grows; to be called in a process of its own."""
    loss = CONTENDERS[name]()
    given = operands(size)
    if name == "torch.compile":
        step(loss, *given)  # the compiler's own memory does not count
    step(linear_cross_entropy, *operands(size._replace(tokens=8, vocabulary=64)))  # loads libraries
    given[0].grad = given[1].grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(loss, *given)
    return resident("VmHWM") - before


def measured_apart(name: str, size: Size, threads: int) -> float:
    """Return the growth in MiB, measured in a new process."""
    command = [sys.executable, __file__, "--peak", name, "--threads", str(threads), *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 2**20


# Time #


def times(size: Size, rounds: int) -> dict[str, list[float]]:
    losses = {name: make() for name, make in CONTENDERS.items()}
    given = operands(size)
    for loss in losses.values():
        step(loss, *given)
    samples: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss, *given)
            samples[name].append(time.perf_counter() - start)
    return samples


# Report #


def measure(size: Size, rounds: int, threads: int) -> list[Row]:
    peaks = {name: measured_apart(name, size, threads) for name in CONTENDERS}
    samples = times(size, rounds)
    ours = samples["ds-kernels"]
    return [
        Row(
            size.dtype,
            name,
            peaks[name],
            statistics.median(samples[name]),
            peaks[name] / peaks["ds-kernels"],
            statistics.median(theirs / our for theirs, our in zip(samples[name], ours)),
        )
        for name in CONTENDERS
    ]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def report(size: Size, rows: list[Row], rounds: int, threads: int) -> str:
    lines = [
        f"# Cross-entropy over a vocabulary on a CPU, {date.today()}",
        "",
        f"Forward and backward of {size.tokens} tokens, {size.vocabulary} classes, {size.features} features; gradients "
        "of hidden states and weight.",
        f"torch {torch.__version__}; {processor()}; {threads} threads; torch runs "
        f"{torch.backends.cpu.get_cpu_capability()}.",
        f"Time: {rounds} rounds, contenders alternating in one process; load average {os.getloadavg()[0]:.1f}. Memory: "
        "growth of VmHWM over one",
        "step, each contender in a process of its own; both gradients are in it. `ratio` is a contender's figure over "
        "that of ds-kernels:",
        "above 1, ds-kernels is better.",
        "",
        "| type | contender | peak MiB | ratio | median s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.dtype} | {row.name} | {row.peak_mib:.0f} | {row.memory_ratio:.1f} | {row.median_s:.2f} "
        f"| {row.time_ratio:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "size", nargs="*", default=["8192", "32768", "512", "float32"], metavar="tokens classes features type"
    )
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=CONTENDERS, help="only print the growth in bytes for this contender")
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(*map(int, args.size[:3]), args.size[3])
    if args.peak is not None:
        print(peak_growth(args.peak, size))
        return
    rows = [row for dtype in args.types for row in measure(size._replace(dtype=dtype), args.rounds, args.threads)]
    text = report(size, rows, args.rounds, args.threads)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
