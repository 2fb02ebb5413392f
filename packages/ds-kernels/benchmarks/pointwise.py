"""Times activations and norms, forward and backward, against eager torch and torch.compile, alternating in one process.

    python benchmarks/pointwise.py --ops swiglu --threads 1 2 --out pointwise.md

Contenders take turns; ratios are medians of the ratios within one round, so that slow minutes of a shared machine hit
all alike. GB/s count what one pass forward and one backward must move, and an in-place axpy in the same rounds is what
memory gives. ``--out`` appends, so that a table can be made in parts; the first part brings the heading.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from ds_kernels.ops import (
    bias_dropout_residual,
    bias_gelu,
    bias_swiglu,
    layer_norm,
    masked_softmax_dropout,
    rms_norm,
)
from torch import Tensor
from torch.nn import functional

MIN_SECONDS = 0.02  # of one sample; short passes are repeated to fill it
Function = Callable[..., "tuple[Tensor, ...]"]


class Task(NamedTuple):
    """One op: ours, and the same in torch."""

    name: str
    arrays: float  # of the input's size that one pass forward and one backward read and write
    ours: Function
    eager: Function
    residual: bool


class Contender(NamedTuple):
    """One contender's result."""

    median_ms: float
    gb_per_s: float
    ratio: float  # its time over ours, median within rounds


def tasks() -> Iterator[Task]:
    for approximate in ("none", "tanh"):
        yield Task(
            f"bias_gelu {approximate}",
            5,
            lambda x, r, w, b, how=approximate: (bias_gelu(x, b, approximate=how),),
            lambda x, r, w, b, how=approximate: (functional.gelu(x + b, approximate=how),),
            False,
        )
    yield Task("bias_swiglu", 4, lambda x, r, w, b: (bias_swiglu(x, b),), plain_swiglu, False)
    yield Task("layer_norm", 5, lambda x, r, w, b: layer_norm(x, w, b)[:1], plain_layer_norm, False)
    yield Task("rms_norm", 5, lambda x, r, w, b: rms_norm(x, w)[:1], plain_rms_norm, False)
    yield Task("residual + layer_norm", 8, lambda x, r, w, b: layer_norm(x, w, b, residual=r), add_layer_norm, True)
    yield Task("residual + rms_norm", 8, lambda x, r, w, b: rms_norm(x, w, residual=r), add_rms_norm, True)
    for p in (0.1, 0.0):
        yield Task(
            f"bias + dropout {p} + residual",
            5 if p else 4,
            lambda x, r, w, b, p=p: (bias_dropout_residual(x, b, r, p),),
            lambda x, r, w, b, p=p: (r + functional.dropout(x + b, p),),
            True,
        )
        yield Task(
            f"softmax + dropout {p}",
            6 if p else 5,
            lambda x, r, w, b, p=p: (masked_softmax_dropout(x, b.detach(), p=p, scale=0.125),),
            lambda x, r, w, b, p=p: (functional.dropout(functional.softmax(x * 0.125 + b.detach(), -1), p),),
            False,
        )


def plain_swiglu(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    gate, value = (x + bias).chunk(2, -1)
    return (functional.silu(gate) * value,)


def plain_layer_norm(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (functional.layer_norm(x, x.shape[-1:], weight, bias),)


def plain_rms_norm(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (functional.rms_norm(x, x.shape[-1:], weight, 1e-6),)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return functional.layer_norm(total, total.shape[-1:], weight, bias), total


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return functional.rms_norm(total, total.shape[-1:], weight, 1e-6), total


def forward_backward(function: Function, inputs: list[Tensor]) -> Callable[[], object]:
    grads = [torch.randn_like(output) for output in function(*inputs)]

    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        torch.autograd.backward(function(*inputs), grads)

    return step


def measure(task: Task, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, Contender]:
    x, residual = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[1], dtype=dtype).requires_grad_() for _ in range(2))
    inputs = [x, residual, weight, bias]
    y, z = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    compiled = torch.compile(task.eager, fullgraph=True)
    steps = {
        "ds-kernels": forward_backward(task.ours, inputs),
        "eager": forward_backward(task.eager, inputs),
        "torch.compile": forward_backward(compiled, inputs),
        "axpy": lambda: y.add_(z, alpha=1e-3),
    }
    repeats = {name: max(1, round(MIN_SECONDS / (sample(step, 1), sample(step, 2))[1])) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(sample(step, repeats[name]))
    nbytes = x.nbytes * task.arrays
    return {
        name: Contender(
            1e3 * statistics.median(seconds),
            (3 * x.nbytes if name == "axpy" else nbytes) / statistics.median(seconds) / 1e9,
            statistics.median(mine / ours for mine, ours in zip(seconds, times["ds-kernels"])),
        )
        for name, seconds in times.items()
    }


def sample(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def heading(rounds: int) -> list[str]:
    return [
        f"# Activations and norms, forward and backward, on a CPU, {date.today()}",
        "",
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores;",
        f"{rounds} rounds, contenders alternating in one process. Times of ds-kernels; eager and compile are the",
        "times of torch over them: above 1, ds-kernels is faster. GB/s count each array that must be read or",
        "written once; `of axpy` is their share of the rate of `y.add_(x, alpha)` in the same rounds.",
        "",
        "| op | shape | data type | threads | median ms | GB/s | of axpy | eager | compile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def line(task: Task, shape: str, dtype: torch.dtype, threads: int, rounds: int) -> str:
    results = measure(task, tuple(map(int, shape.split("x"))), dtype, rounds)
    ours, axpy = results["ds-kernels"], results["axpy"]
    return (
        f"| {task.name} | {shape} | {str(dtype)[6:]} | {threads} | {ours.median_ms:.2f} | {ours.gb_per_s:.1f} "
        f"| {ours.gb_per_s / axpy.gb_per_s:.2f} | {results['eager'].ratio:.2f} | {results['torch.compile'].ratio:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="", help="only ops whose names contain this")
    parser.add_argument("--shapes", nargs="+", default=["2048x3072", "4096x1024"], help="rows x columns")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="append the table as Markdown")
    args = parser.parse_args()
    lines = heading(args.rounds) if args.out is None or not args.out.exists() else []
    for task, dtype, threads in product(tasks(), args.dtypes, args.threads):
        if args.ops in task.name:
            torch.set_num_threads(threads)
            for shape in args.shapes:
                torch.compiler.reset()
                lines.append(line(task, shape, getattr(torch, dtype), threads, args.rounds))
                print(lines[-1], flush=True)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
