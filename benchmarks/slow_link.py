"""Training steps over a slow link: optimizers that send few bits, beside DDP and its hooks.

Two ranks in two network namespaces, joined by a link of a given rate (root and iproute2 are needed). All contenders
live in the same two processes and take turns; a turn is one round of the contender: one step, or with local steps as
many as lie between exchanges. Optimizers are measured after their warm-up. The floor trains without communication.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ds_comm.codecs import BlockCodec
from ds_comm.optim import CompressedAdam, LocalSteps, OneBitAdam, OneBitLamb, ZeroOneAdam
from ds_testkit import slow_link
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

WIDTHS = {"3.3M": 1024, "25M": 2896}  # three square layers
HYPER = {"lr": 1e-5, "eps": 1e-3}  # some gradients are zero when variances freeze
LOCAL = 4  # local steps of 0/1 Adam
ROUND = 16  # local steps of DiLoCo


class Contender(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int = 1  # in a turn
    warm_up: int = 3  # turns

    def step(self, batch: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()


def mlp(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Linear(width, 64))


def replicated(
    width: int, hook: Callable[..., Any] | None = None, state: object = None, bucket_mb: float | None = None
) -> Contender:
    model = DistributedDataParallel(mlp(width), gradient_as_bucket_view=True, init_sync=False, bucket_cap_mb=bucket_mb)
    if hook is not None:
        model.register_comm_hook(state, hook)
    return Contender(model, torch.optim.Adam(model.parameters(), fused=True, **HYPER), warm_up=4)


def low_rank(width: int) -> Contender:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    # one bucket: over gloo the hook hangs with several, whose operations different ranks start in different orders
    return replicated(width, powerSGD_hook.powerSGD_hook, state, bucket_mb=1000)


def own(width: int, kind: Callable[..., torch.optim.Optimizer], steps: int = 1, **settings: Any) -> Contender:
    model = mlp(width)
    return Contender(model, kind(model.parameters(), **HYPER, **settings), steps)


def floor(width: int) -> Contender:
    return own(width, torch.optim.Adam, fused=True)


def local_steps(width: int) -> Contender:
    model = mlp(width)
    inner = torch.optim.Adam(model.parameters(), fused=True, **HYPER)
    return Contender(model, LocalSteps(inner, every=ROUND, codec=BlockCodec(code="int4")), ROUND, warm_up=1)


def zero_one(width: int) -> Contender:
    intervals = {"var_freeze_step": 1, "local_step_scaler": 1, "local_step_clipper": LOCAL}
    return own(width, ZeroOneAdam, LOCAL, **intervals)


CONTENDERS: dict[str, Callable[[int], Contender]] = {
    "floor": floor,
    "DDP": replicated,
    "DDP, fp16 hook": lambda width: replicated(width, default_hooks.fp16_compress_hook),
    "DDP, PowerSGD rank 4": low_rank,
    "1-bit Adam": lambda width: own(width, OneBitAdam, freeze_step=1),
    "1-bit Adam, sign": lambda width: own(
        width, OneBitAdam, freeze_step=1, codec=BlockCodec(code="sign", scale_dtype=torch.float16)
    ),
    "1-bit Adam, ternary": lambda width: own(width, OneBitAdam, freeze_step=1, codec=BlockCodec(code="ternary")),
    "1-bit LAMB": lambda width: own(width, OneBitLamb, freeze_step=1),
    f"0/1 Adam, {LOCAL} local steps": zero_one,
    "int4 + error feedback": lambda width: own(width, CompressedAdam),
    f"local steps, {ROUND}": local_steps,
}


# One rank #


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    names = [name for name in CONTENDERS if any(part in name for part in options.contenders)]
    contenders = {name: CONTENDERS[name](WIDTHS[options.size]) for name in names}
    batch = torch.randn(options.batch, WIDTHS[options.size])
    numel = sum(param.numel() for param in mlp(WIDTHS[options.size]).parameters())
    for contender in contenders.values():
        for _ in range(contender.warm_up * contender.steps):
            contender.step(batch)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    sent: dict[str, float] = {}
    until = time.monotonic() + options.seconds
    while True:
        for name, contender in contenders.items():
            dist.barrier()
            counters, start = slow_link.Counters(os.environ["GLOO_SOCKET_IFNAME"]), time.perf_counter()
            for _ in range(contender.steps):
                contender.step(batch)
            if name != "floor":
                dist.barrier()
            seconds[name].append((time.perf_counter() - start) / contender.steps)
            sent[name] = counters.sent() / contender.steps / numel
        go_on = torch.tensor(float(time.monotonic() < until))
        dist.all_reduce(go_on, dist.ReduceOp.MIN)
        if not go_on:
            break
    dist.destroy_process_group()
    print(json.dumps({"numel": numel, "seconds": seconds, "sent": sent}))


# Both, and the table #


def table(rate: str, size: str, batch: int, reports: Sequence[dict[str, Any]]) -> list[str]:
    first = reports[0]
    medians = {name: max(statistics.median(report["seconds"][name]) for report in reports) for name in first["seconds"]}
    turns = len(first["seconds"]["floor"])
    lines = [
        f"## {size}, {rate}",
        "",
        f"{first['numel'] / 1e6:.1f} M parameters, batches of {batch}; {turns} turns each.",
        "",
        "| contender | bytes/parameter/step sent | ms/step | DDP / it |",
        "|---|---|---|---|",
    ]
    for name, median in medians.items():
        times = f"{medians['DDP'] / median:.2f}" if "DDP" in medians else ""
        lines.append(f"| {name} | {first['sent'][name]:.3f} | {median * 1e3:.1f} | {times} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--size", choices=WIDTHS, default="3.3M")
    parser.add_argument("--batch", type=int, default=16, help="of each rank: more of it, more to compute")
    parser.add_argument("--contenders", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--seconds", type=float, default=30.0, help="per rate; after these a last turn ends")
    parser.add_argument("--out", type=Path, help="Markdown file to which tables are appended")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure(options)
        return
    reason = slow_link.unusable()
    if reason is not None:
        sys.exit(f"no slow link here: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # takes the link down
    load = f"load average {os.getloadavg()[0]:.1f} before"
    lines = [
        f"torch {torch.__version__}; {platform.machine()}, {os.cpu_count()} cores, a thread for each rank; {load}.",
        "",
    ]
    for rate in options.rates:
        numbers = ("--batch", str(options.batch), "--seconds", str(options.seconds))
        program = [sys.executable, "-W", "ignore", __file__, "--rank", "--size", options.size, *numbers]
        program += ["--contenders", *options.contenders]
        with slow_link.SlowLink(rate) as link:
            lines += table(rate, options.size, options.batch, link.run(program, timeout=2 * options.seconds + 180))
    text = "\n".join(lines)
    print(text)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
