"""Times activations and norms, forward and backward, against eager torch and torch.compile, alternating in one process.

    python benchmarks/pointwise.py --threads 1 2 --out pointwise.md

Contenders take turns; ratios are medians of the ratios within one round, so that slow minutes of a shared machine hit
all alike. ``bytes`` is what one pass forward and one backward must move for each element, GB/s count it for
every contender, and an in-place axpy in the same rounds is the floor: what memory gives.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from ds_kernels.ops import bias_gelu, layer_norm, rms_norm
from torch import Tensor
from torch.nn import functional

MIN_SECONDS = 0.02  # of one sample; short passes are repeated to fill it
Function = Callable[..., "tuple[Tensor, ...]"]


class Task(NamedTuple):
    """One op: ours, and the same in torch."""

    name: str
    arrays: int  # of the input's size that one pass forward and one backward read and write
    ours: Function
    eager: Function
    residual: bool


class Row(NamedTuple):
    """One contender's result."""

    contender: str
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
    yield Task("layer_norm", 5, lambda x, r, w, b: layer_norm(x, w, b)[:1], plain_layer_norm, False)
    yield Task("rms_norm", 5, lambda x, r, w, b: rms_norm(x, w)[:1], plain_rms_norm, False)
    yield Task("residual + layer_norm", 8, lambda x, r, w, b: layer_norm(x, w, b, residual=r), add_layer_norm, True)
    yield Task("residual + rms_norm", 8, lambda x, r, w, b: rms_norm(x, w, residual=r), add_rms_norm, True)


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


def forward_backward(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        outputs = function(*inputs)
        torch.autograd.backward(outputs, grads[: len(outputs)])

    return step


def measure(task: Task, shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> list[Row]:
    x, residual = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[1], dtype=dtype).requires_grad_() for _ in range(2))
    grads = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    inputs = [x, residual, weight, bias]
    y, z = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    compiled = torch.compile(task.eager, fullgraph=True)
    steps = {
        "ds-kernels": forward_backward(task.ours, inputs, grads),
        "eager": forward_backward(task.eager, inputs, grads),
        "torch.compile": forward_backward(compiled, inputs, grads),
        "axpy": lambda: y.add_(z, alpha=1e-3),
    }
    repeats = {name: max(1, round(MIN_SECONDS / (sample(step, 1), sample(step, 2))[1])) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(sample(step, repeats[name]))
    nbytes = x.nbytes * task.arrays
    return [
        Row(
            name,
            1e3 * statistics.median(seconds),
            (3 * x.nbytes if name == "axpy" else nbytes) / statistics.median(seconds) / 1e9,
            statistics.median(mine / ours for mine, ours in zip(seconds, times["ds-kernels"])),
        )
        for name, seconds in times.items()
    ]


def sample(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2048x3072", "4096x1024"], help="rows x columns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    lines = [
        f"# Activations and norms, forward and backward, on a CPU, {date.today()}",
        "",
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores;",
        f"{args.rounds} rounds, contenders alternating in one process. `ratio` is a contender's time over that of",
        "ds-kernels: above 1, ds-kernels is faster. GB/s count one pass forward and one backward for all; the axpy",
        "(`y.add_(x, alpha)`) is the floor.",
        "",
        "| op | shape | data type | threads | contender | median ms | GB/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in args.shapes:
            for dtype in (torch.float32, torch.bfloat16):
                for task in tasks():
                    torch.compiler.reset()
                    for row in measure(task, tuple(map(int, shape.split("x"))), dtype, args.rounds):
                        head = f"| {task.name} | {shape} | {str(dtype)[6:]} | {threads} "
                        lines.append(
                            f"{head}| {row.contender} | {row.median_ms:.2f} | {row.gb_per_s:.1f} | {row.ratio:.2f} |"
                        )
                        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
