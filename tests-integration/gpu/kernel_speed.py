"""How fast are the GPU kernels: beside a copy of memory, torch's own kernels and compiled ones, in one process.

Contenders take turns; each figure is a median of device time. Bytes are counted once for each tensor read or written.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from kernel_checks import kernel, need_gpu, products_of
from outcome import Figures, NotRun
from torch.nn import functional

from ds_kernels import AdamHyper
from ds_kernels.backends.checks import Beside
from ds_kernels.backends.payload import DIGITS, Layout
from ds_kernels.hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper

ROUNDS = 15
NUMEL = 1 << 28  # 1 GiB in float32: far beyond any cache

FIRST_USE = """
import json, sys, time
import torch
import ds_kernels
from ds_kernels.backends.nvrtc.backend import NvrtcBackend
device = torch.device("cuda")
state = [torch.ones(1 << 20, device=device) for _ in range(4)]
torch.cuda.synchronize()
start = time.perf_counter()
adamw = NvrtcBackend().find("adamw", device, torch.float32)
adamw(*state, copy=None, hyper=ds_kernels.AdamHyper(step=1, lr=1e-3))
torch.cuda.synchronize()
first = time.perf_counter() - start
start = time.perf_counter()
for _ in range(1000):
    adamw(*state, copy=None, hyper=ds_kernels.AdamHyper(step=1, lr=1e-3))
enqueued = time.perf_counter() - start
torch.cuda.synchronize()
print(json.dumps([first, enqueued / 1000]))
"""


def medians(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each, called in turn."""
    for run in contenders.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def table(milliseconds: dict[str, float], amount: dict[str, float], unit: str) -> Figures:
    """Return time and rate of each contender; ``amount`` is what one call moves, in bytes, for GB/s."""
    return {name: {"ms": round(ms, 4), unit: round(amount[name] / ms / 1e6, 1)} for name, ms in milliseconds.items()}


def first_use_cold_and_cached(device: torch.device) -> Figures:
    """Time of the first step of a process, compiled (target: 3 s) and from the disk (target: 20 ms)."""
    need_gpu(device)
    kernel("nvrtc", "adamw", device)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "DS_KERNELS_CACHE": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        for name in ("cold", "cached", "cached again"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_USE], env=env, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stderr
            first, enqueue = json.loads(done.stdout.splitlines()[-1])
            figures[name] = {"first ms": round(first * 1e3, 2), "later us": round(enqueue * 1e6, 2)}
    figures["targets met"] = figures["cold"]["first ms"] < 3000 and figures["cached again"]["first ms"] < 20
    return figures


def adamw_beside_copy_and_torch(device: torch.device) -> Figures:
    """A step of float32 with a bfloat16 copy (30 bytes an element), and without (28), beside torch's fused AdamW."""
    need_gpu(device)
    adamw = kernel("nvrtc", "adamw", device)
    hyper = AdamHyper(step=5, lr=1e-3, weight_decay=0.1)
    param, grad, m, v = (torch.randn(NUMEL, device=device) for _ in range(4))
    v.abs_()
    half_grad, copy = grad.bfloat16(), torch.empty_like(grad, dtype=torch.bfloat16)
    theirs = torch.nn.Parameter(param.clone())
    theirs.grad = grad
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1, fused=True)
    contenders = {
        "copy of memory": lambda: m.copy_(v),
        "ours, float32": lambda: adamw(param, grad, m, v, copy=None, hyper=hyper),
        "torch fused, float32": optimizer.step,
        "ours, bf16 grad and copy": lambda: adamw(param, half_grad, m, v, copy=copy, hyper=hyper),
    }
    moved = dict.fromkeys(contenders, 28.0 * NUMEL) | {"copy of memory": 8.0 * NUMEL}
    figures = table(medians(contenders), moved, "GB/s")
    rates = {name: row["GB/s"] for name, row in figures.items()}
    figures["ours / copy"] = round(rates["ours, float32"] / rates["copy of memory"], 3)
    figures["ours / torch"] = round(rates["ours, float32"] / rates["torch fused, float32"], 3)
    return figures


def other_steps_beside_copy(device: torch.device) -> Figures:
    """Steps of Lion, Adagrad, SGD and LAMB in float32, and of AdamW in 14.3 bytes an element."""
    need_gpu(device)
    find = {op: kernel("nvrtc", op, device) for op in ("lion", "adagrad", "sgd", "lamb_moments", "lamb_step")}
    numel = NUMEL // 2
    param, grad, first, second = (torch.randn(numel, device=device) for _ in range(4))
    second.abs_()
    lamb = LambHyper(step=5, lr=1e-3, weight_decay=0.1)
    high, low = param.bfloat16(), torch.zeros(numel, dtype=torch.int16, device=device)
    half, codes = grad.bfloat16(), [torch.zeros(numel, dtype=d, device=device) for d in (torch.int8, torch.uint8)]
    names = "exp_avg", "exp_avg_sq"
    scales = {name: torch.ones(numel // 32, dtype=torch.bfloat16, device=device) for name in names}
    coded, adam = kernel("nvrtc", "coded_adamw", device), AdamHyper(step=5, lr=1e-3, weight_decay=0.1)
    beside, states = Beside(low, scales), (first, second)
    contenders = {
        "copy of memory": lambda: first.copy_(second),
        "Lion": lambda: find["lion"](param, grad, first, hyper=LionHyper(lr=1e-3)),
        "Adagrad": lambda: find["adagrad"](param, grad, second, hyper=AdagradHyper(step=5, lr=1e-3)),
        "SGD": lambda: find["sgd"](param, grad, hyper=SgdHyper(lr=1e-3)),
        "SGD, momentum": lambda: find["sgd"](param, grad, first, hyper=SgdHyper(lr=1e-3, momentum=0.9)),
        "LAMB, moments": lambda: find["lamb_moments"](param, grad, *states, hyper=lamb),
        "LAMB, step": lambda: find["lamb_step"](param, *states, ratio=0.5, hyper=lamb),
        "AdamW, split, int8": lambda: coded(high, half, *codes, hyper=adam, beside=beside),
    }
    widths = (8, 20, 20, 12, 20, 24, 16, 14.25)
    return table(medians(contenders), {name: float(w * numel) for name, w in zip(contenders, widths)}, "GB/s")


def payloads_beside_copy(device: torch.device) -> Figures:
    """Each code in blocks of 256: encode with error feedback, decode, accumulate."""
    need_gpu(device)
    encode, decode, accumulate = (kernel("nvrtc", f"block_{op}", device) for op in ("encode", "decode", "accumulate"))
    x, error, out = (torch.randn(NUMEL // 2, device=device) for _ in range(3))
    contenders: dict[str, Callable[[], object]] = {"copy of memory": lambda: out.copy_(x)}
    moved = {"copy of memory": 8.0 * x.numel()}
    for code in DIGITS:
        layout = Layout(code, 256, torch.float32)
        size = layout.payload_bytes(x.numel())
        payload = torch.empty(size, dtype=torch.uint8, device=device)
        for name, bytes_each, run in (
            ("encode", 12, lambda p, of: encode(x, error, p, of)),
            ("decode", 4, lambda p, of: decode(out, p, of)),
            ("accumulate", 8, lambda p, of: accumulate(out, p, of, 0.5)),
        ):
            contenders[f"{code}, {name}"] = functools.partial(run, payload, layout)
            moved[f"{code}, {name}"] = float(bytes_each * x.numel() + size)
    return table(medians(contenders), moved, "GB/s")


def sums_beside_copy_and_torch(device: torch.device) -> Figures:
    """Sums of squares in chunks of 4,096, and the sum of eight arrays."""
    need_gpu(device)
    tree_sum, chunk_sumsq = (kernel("nvrtc", op, device) for op in ("tree_sum", "chunk_sumsq"))
    x = torch.randn(NUMEL, device=device)
    half, other = x.bfloat16(), torch.empty_like(x)
    pieces, out = list(half.view(8, -1)), torch.empty(NUMEL // 8, device=device)
    contenders = {
        "copy of memory": lambda: other.copy_(x),
        "ours, squares, float32": lambda: chunk_sumsq(x, 4096),
        "torch norm, float32": lambda: torch.linalg.vector_norm(x),
        "ours, squares, bfloat16": lambda: chunk_sumsq(half, 4096),
        "ours, sum of 8, bfloat16": lambda: tree_sum(out, pieces),
    }
    moved = {
        "copy of memory": 8.0 * NUMEL,
        "ours, squares, float32": 4.0 * NUMEL,
        "torch norm, float32": 4.0 * NUMEL,
        "ours, squares, bfloat16": 2.0 * NUMEL,
        "ours, sum of 8, bfloat16": 2.0 * NUMEL + 0.5 * NUMEL,
    }
    return table(medians(contenders), moved, "GB/s")


def bias_gelu_beside_torch(device: torch.device) -> Figures:
    """Forward and backward in bfloat16, [16384, 8192], beside eager torch and torch.compile."""
    need_gpu(device)
    rows, columns = 16384, 8192
    x, grad = (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(columns, device=device, dtype=torch.bfloat16)

    def plain(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x + bias)

    def backward_of(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        inputs = [t.detach().requires_grad_() for t in (x, bias)]
        out = function(*inputs)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    compiled = torch.compile(plain)
    forward, backward = (kernel("nvrtc", op, device) for op in ("bias_gelu", "bias_gelu_backward"))
    contenders = {
        "forward: ours": lambda: forward(x, bias, "none"),
        "forward: eager": lambda: plain(x, bias),
        "forward: compiled": lambda: compiled(x, bias),
        "backward: ours": lambda: backward(grad, x, bias, "none"),
        "backward: eager": backward_of(plain),
        "backward: compiled": backward_of(compiled),
    }
    fewest = {name: (2.0 if "forward" in name else 3.0) * 2 * rows * columns for name in contenders}
    return table(medians(contenders), fewest, "GB/s")


def products_beside_torch(device: torch.device) -> Figures:
    """8192 rows, 4096 and 16384 columns in bfloat16: forward with bias and GELU, backward with its slope."""
    need_gpu(device)
    ours = {"ours": products_of(device, hopper=False)}
    with suppress(NotRun):
        ours["ours for Hopper"] = products_of(device, hopper=True)
    rows, columns, inner = 8192, 16384, 4096
    x, weight = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (rows, columns))
    bias = torch.randn(columns, device=device, dtype=torch.bfloat16)
    inside = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    after = weight.t().contiguous()

    def forward() -> torch.Tensor:
        return functional.gelu(functional.linear(x, weight, bias))

    def backward() -> torch.Tensor:
        return torch.ops.aten.gelu_backward(x @ after, inside)

    contenders: dict[str, Callable[[], Any]] = {}
    for name, find in ours.items():
        contenders[f"forward: {name}, keeps what is inside"] = partial(find("linear_gelu"), x, weight, bias)
        contenders[f"backward: {name}"] = partial(find("linear_dgelu"), x, after, inside)
    for name, plain in {"forward": forward, "backward": backward}.items():
        contenders[f"{name}: cuBLAS and eager"] = plain
        contenders[f"{name}: torch.compile"] = torch.compile(plain)
    contenders["the product alone"] = lambda: x @ weight.t()
    milliseconds = medians(contenders)
    work = 2.0 * rows * columns * inner
    return {name: {"ms": round(ms, 4), "TFLOP/s": round(work / ms / 1e9, 1)} for name, ms in milliseconds.items()}


CHECKS: list[Callable[[torch.device], Figures]] = [
    first_use_cold_and_cached,
    adamw_beside_copy_and_torch,
    other_steps_beside_copy,
    payloads_beside_copy,
    sums_beside_copy_and_torch,
    bias_gelu_beside_torch,
    products_beside_torch,
]
