"""Times coding and decoding of messages against an in-place axpy, alternating in one process.

    python benchmarks/block_codecs.py --threads 1 2 --out block_codecs.md

GB/s count each array once; ``y.add_`` is the yardstick of what memory gives in the same round. The last column is the
share of that rate, the median of the shares within a round: near 1, the code costs nothing over moving its bytes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from ds_kernels import CpuBackend
from ds_kernels.codecs import BlockCodec

MIN_SECONDS = 0.01  # of one sample; short calls are repeated to fill it


class Contender(NamedTuple):
    """One call on memory of its own."""

    name: str
    moved_bytes: float  # read and written, per element
    call: Callable[[], object]


class Row(NamedTuple):
    """One contender's result."""

    name: str
    numel: int
    threads: int
    median_ms: float
    gb_per_s: float
    share: float  # of the axpy's rate


def contenders(numel: int) -> list[Contender]:
    x, y = torch.randn(numel), torch.randn(numel)
    found = [Contender("y.add_(x, alpha)", 12, lambda: y.add_(x, alpha=1e-3))]
    for code in ("sign", "ternary", "int4", "int8"):
        found += of_code(code, numel)
    return found


def of_code(code: str, numel: int) -> list[Contender]:
    codec = BlockCodec(code=code, kernels=CpuBackend())
    x, error, out = torch.randn(numel), torch.zeros(numel), torch.empty(numel)
    payload = codec.encode(x)
    size = len(payload) / numel
    return [
        Contender(f"{code}: encode", 4 + size, lambda: codec.encode(x, payload=payload)),
        Contender(f"{code}: encode with error", 12 + size, lambda: codec.encode(x, error=error, payload=payload)),
        Contender(f"{code}: decode", 4 + size, lambda: codec.decode(payload, out)),
        Contender(f"{code}: accumulate", 8 + size, lambda: codec.accumulate(payload, out, scale=1e-3)),
    ]


def measure(numel: int, threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    found = contenders(numel)
    repeats = {one.name: repeats_of(one) for one in found}
    rates: dict[str, list[float]] = {one.name: [] for one in found}
    for _ in range(rounds):
        for one in found:
            rates[one.name].append(one.moved_bytes * numel / sample(one, repeats[one.name]) / 1e9)
    yardstick = rates[found[0].name]
    return [
        Row(
            one.name,
            numel,
            threads,
            one.moved_bytes * numel / statistics.median(rates[one.name]) / 1e6,
            statistics.median(rates[one.name]),
            statistics.median(rate / axpy for rate, axpy in zip(rates[one.name], yardstick)),
        )
        for one in found
    ]


def repeats_of(one: Contender) -> int:
    one.call()
    return max(1, round(MIN_SECONDS / sample(one, 1)))


def sample(one: Contender, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        one.call()
    return (time.perf_counter() - start) / repeats


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def report(rows: list[Row], rounds: int) -> str:
    lines = [
        f"# Block codes on a CPU, {date.today()}",
        "",
        f"torch {torch.__version__}; {processor()}; float32, blocks of 256, float32 scales.",
        f"{rounds} rounds, contenders alternating in one process; load average {os.getloadavg()[0]:.1f}. GB/s count",
        "each array once; `of axpy` is the share of the rate of `y.add_` in the same round.",
        "",
        "| call | elements | threads | median ms | GB/s | of axpy |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.numel / 1e6:g} M | {row.threads} | {row.median_ms:.2f} | {row.gb_per_s:.1f} "
        f"| {row.share:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 25e6], help="elements")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    rows = [
        row for numel in args.sizes for threads in args.threads for row in measure(int(numel), threads, args.rounds)
    ]
    text = report(rows, args.rounds)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
