"""Trains the example's model with every optimizer for slow links: do they reach Adam's loss, and at what volume?

    python -m benchmarks.convergence --runs runs.jsonl --out benchmarks/results/NAME.md

Four ranks, as threads of this process, which exchange by the same calls of ``torch.distributed`` as processes would.
Each rank trains on windows of its own; all methods see the same windows for the same seed, with the same schedule:
linear warm-up over a tenth of the steps, then a cosine down to a tenth. ``Adam`` is torch's, on gradients averaged in
float32; the whole volume of every other method is compared with the bytes of that.

The learning rate is swept in factors of 2 with one seed, around three first values, until the best one has a worse one
on either side; then the other seeds run at the best, and at what came close; the best mean counts. Every run that ended
is a line of JSON in ``--runs``; what stands there is not run again, so the program may be ended and started at any
time. What counts is the best loss on held-out text, looked at when no round of local steps is under way.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from ds_comm.all_reduce import mean_exactly
from ds_comm.codec import Codec
from ds_comm.codecs import E8Codec
from ds_comm.optim import CompressedAdam, Link, LocalSteps, OneBitAdam, OneBitLamb, ZeroOneAdam
from ds_comm.traffic import Traffic
from ds_kernels.codecs import BlockCodec
from ds_testkit.threads import on_threads
from torch import Tensor, nn

EXAMPLES = Path(__file__).parent.parent / "examples"
ADAM: Mapping[str, Any] = MappingProxyType({"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})
FROZEN: Mapping[str, Any] = MappingProxyType({**ADAM, "eps": 1e-5})
"""An element that had hardly a gradient when its variance froze steps by ``lr / eps``: hence a larger eps."""
RANKS = 4
CLOSE = 1.005  # other seeds run at every learning rate whose first one comes so close to the best
EVERY = 4  # local steps in a round of DiLoCo
EVALUATE_EVERY = 40  # a multiple of all rounds


class Options(NamedTuple):
    """Sizes of one run."""

    dim: int
    layers: int
    length: int  # bytes of a window
    batch: int  # windows of a rank
    steps: int


class Run(NamedTuple):
    """One training: a line of the file."""

    method: str
    lr: float
    seed: int
    held_out: list[tuple[int, float]]  # step, nats per byte
    training: list[float]  # of each step, rank 0's
    sent: float  # bytes per parameter that a rank sent in the whole run
    seconds: float
    options: Options

    @property
    def best(self) -> float:
        """The best loss on held-out text; not a number counts as infinite."""
        return min((loss for _, loss in self.held_out if math.isfinite(loss)), default=math.inf)


class ExactAdam(torch.optim.Adam):
    """torch's Adam, on the exact mean of the gradients."""

    def __init__(self, params: Sequence[nn.Parameter], **settings: Any) -> None:
        super().__init__(params, **settings, foreach=True)
        self.traffic = Traffic()

    def step(self) -> None:  # type: ignore[override]
        grads = [param.grad for param in self.param_groups[0]["params"]]
        flat = torch.cat([grad.flatten() for grad in grads])
        mean_exactly(flat, None, traffic=self.traffic)
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        super().step()


# Methods #

Make = Callable[[list[nn.Parameter], float, int], torch.optim.Optimizer]
HALF = Link(exact_dtype=torch.bfloat16, on_nonfinite="skip")
TERNARY = BlockCodec(code="ternary")


class Method(NamedTuple):
    settings: str  # for the table
    lrs: tuple[float, ...]  # the first ones
    make: Make  # from parameters, learning rate and the number of steps
    beside: str = "Adam"  # what it is compared with: Adam of the same eps


def one_bit(kind: type[OneBitAdam | OneBitLamb], codec: Codec) -> Make:
    return lambda params, lr, steps: kind(
        params, lr, freeze_step=steps // 5, bias_correction=True, codec=codec, link=HALF, **FROZEN
    )


def zero_one(params: list[nn.Parameter], lr: float, steps: int) -> torch.optim.Optimizer:
    frozen = steps // 5
    return ZeroOneAdam(
        params,
        lr,
        var_freeze_step=frozen,
        var_update_scaler=frozen,
        local_step_scaler=2 * frozen,
        local_step_clipper=2,
        bias_correction=True,
        codec=E8Codec(),
        link=HALF,
        **FROZEN,
    )


def compressed(block: int, scale_dtype: torch.dtype) -> Make:
    codec = BlockCodec(code="int4", block=block, scale_dtype=scale_dtype)
    return lambda params, lr, _: CompressedAdam(params, lr, codec=codec, link=HALF, **ADAM)


def local_steps(every: int, outer: float, momentum: float) -> Make:
    def make(params: list[nn.Parameter], lr: float, _: int) -> torch.optim.Optimizer:
        inner = torch.optim.Adam(params, lr=lr, foreach=True, **ADAM)
        codec = BlockCodec(code="int4", block=64, scale_dtype=torch.float16)
        return LocalSteps(inner, every=every, lr=outer, momentum=momentum, codec=codec, link=HALF)

    return make


WARMED = "the first 20 % of steps exact, in bfloat16"
LRS = (2e-3, 4e-3, 8e-3)
LOOSE = "Adam, eps 1e-5"
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "Adam": Method("exact, float32", LRS, lambda params, lr, _: ExactAdam(params, lr=lr, **ADAM)),
        LOOSE: Method("likewise", LRS, lambda params, lr, _: ExactAdam(params, lr=lr, **FROZEN), LOOSE),
        "OneBitAdam": Method(f"E8; {WARMED}", LRS, one_bit(OneBitAdam, E8Codec()), LOOSE),
        "OneBitLamb": Method(f"E8; {WARMED}", (8e-3, 16e-3, 32e-3), one_bit(OneBitLamb, E8Codec()), LOOSE),
        "ZeroOneAdam": Method(f"E8; {WARMED}; the last 40 % in rounds of 2 local steps", LRS, zero_one, LOOSE),
        "CompressedAdam": Method("int4 in blocks of 64, float16 scales", LRS, compressed(64, torch.float16)),
        "CompressedAdam, blocks of 128": Method("float32 scales; not swept", (4e-3,), compressed(128, torch.float32)),
        "LocalSteps": Method("Adam inside, int4 every 4 steps, outer lr 1, no momentum", LRS, local_steps(4, 1.0, 0.0)),
        "LocalSteps, rounds of 2": Method("likewise every 2; not swept", (4e-3,), local_steps(2, 1.0, 0.0)),
        "OneBitAdam, ternary": Method("likewise; not swept", (4e-3,), one_bit(OneBitAdam, TERNARY), LOOSE),
    }
)

# Training #


def train(method: str, lr: float, seed: int, text: tuple[Tensor, Tensor], options: Options) -> Run:
    """Train from the beginning, on all ranks."""
    start = time.perf_counter()
    turn = threading.Lock()
    torch.manual_seed(seed)
    first = model_of(options).state_dict()
    run = Run(method, lr, seed, [], [], 0.0, 0.0, options)
    reports = on_threads(RANKS, lambda rank: train_rank(rank, run, text, first, turn))
    return reports[0]._replace(seconds=time.perf_counter() - start)


def model_of(options: Options) -> nn.Module:
    from train_lm import Gpt

    return Gpt(options.dim, options.layers, max(1, options.dim // 32), dropout=0.0)


def train_rank(
    rank: int,
    run: Run,
    text: tuple[Tensor, Tensor],
    first: Mapping[str, Tensor],
    turn: AbstractContextManager[object],
) -> Run:
    """Train on one rank; ``turn`` is held while computing, since threads that all compute only slow each other down."""
    options = run.options
    model = model_of(options)
    model.load_state_dict(first)
    params = list(model.parameters())
    optimizer = METHODS[run.method].make(params, run.lr, options.steps)
    inner = optimizer.inner if isinstance(optimizer, LocalSteps) else optimizer
    windows = torch.Generator().manual_seed(1000 * run.seed + rank)
    for step in range(1, options.steps + 1):
        for group in inner.param_groups:
            group["lr"] = run.lr * scheduled(step, options.steps)
        with turn:
            optimizer.zero_grad()
            at = torch.randint(len(text[0]) - options.length - 1, (options.batch,), generator=windows)
            loss = loss_of(model, text[0], at, options.length)
            loss.backward()
        optimizer.step()
        if rank == 0:
            run.training.append(round(loss.item(), 4))
            if step % EVALUATE_EVERY == 0:
                run.held_out.append((step, judge(model, text[1], options.length)))
    sent = optimizer.traffic.sent / sum(param.numel() for param in params)
    return run._replace(sent=sent)


def scheduled(step: int, steps: int) -> float:
    """Return by what the learning rate is multiplied in ``step`` (1, ...)."""
    warm_up = steps // 10
    done = max(0, step - warm_up) / (steps - warm_up)
    return min(step / warm_up, 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def loss_of(model: nn.Module, data: Tensor, at: Tensor, length: int) -> Tensor:
    windows = data[at[:, None] + torch.arange(length + 1)].long()
    loss: Tensor = model(windows[:, :-1], windows[:, 1:])
    return loss


@torch.no_grad()
def judge(model: nn.Module, data: Tensor, length: int, windows: int = 256) -> float:
    at = torch.arange(windows) * (len(data) - length - 1) // windows
    return statistics.fmean(loss_of(model, data, part, length).item() for part in at.split(64))


# What is still to be run #


def next_run(done: Sequence[Run], methods: Sequence[str], seeds: int) -> tuple[str, float, int] | None:
    """Return method, learning rate and seed of what to run next: sweeps first, then the other seeds."""
    for method in methods:
        lr = next_lr(done, method)
        if lr is not None:
            return method, lr, 0
    for seed in range(1, seeds):
        for method in methods:
            swept = sweep_of(done, method)
            for lr in (lr for lr, loss in swept.items() if loss <= CLOSE * min(swept.values())):
                if not any(run[:3] == (method, lr, seed) for run in done):
                    return method, lr, seed
    return None


def next_lr(done: Sequence[Run], method: str) -> float | None:
    """Return a learning rate of the sweep that is missing; with a single first value nothing is swept."""
    swept, first = sweep_of(done, method), METHODS[method].lrs
    missing = [lr for lr in first if lr not in swept]
    if missing or len(first) == 1:
        return missing[0] if missing else None
    best = min(swept, key=swept.__getitem__)
    return best * 2 if best == max(swept) else best / 2 if best == min(swept) else None


def sweep_of(done: Sequence[Run], method: str) -> dict[float, float]:
    """Return the loss of the first seed by learning rate."""
    return {run.lr: run.best for run in done if run.method == method and run.seed == 0}


def at_best(done: Sequence[Run], method: str, seeds: int) -> list[Run]:
    """Return the runs of all seeds at the learning rate with the best mean, by seed."""
    by_lr = [
        sorted((run for run in done if run[:2] == (method, lr) and run.seed < seeds), key=lambda run: run.seed)
        for lr in sweep_of(done, method)
    ]
    whole = [runs for runs in by_lr if len(runs) == seeds]
    return min(whole, key=lambda runs: statistics.fmean(run.best for run in runs), default=[])


def read_runs(path: Path, options: Options) -> list[Run]:
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [Run(**json.loads(line)) for line in lines]
    return [run._replace(options=options) for run in runs if Options(*run.options) == options]


def run_all(path: Path, methods: Sequence[str], seeds: int, text: tuple[Tensor, Tensor], options: Options) -> None:
    while (todo := next_run(read_runs(path, options), methods, seeds)) is not None:
        run = train(*todo, text, options)
        with path.open("a") as file:
            file.write(json.dumps(run._asdict()) + "\n")
        print(f"{run.method} lr {run.lr:g} seed {run.seed}: {run.best:.4f}, {run.seconds:.1f} s", flush=True)


# Report #


def report(done: Sequence[Run], seeds: int, picture: str) -> list[str]:
    """Return a table in Markdown: losses beside Adam's, and bytes of whole runs."""
    found = {method: runs for method in METHODS if (runs := at_best(done, method, seeds))}
    options, adam = done[0].options, found["Adam"]
    lines = [
        f"# Optimizers for slow links: loss and volume of whole runs, {date.today()}",
        "",
        f"`python -m benchmarks.convergence {' '.join(sys.argv[1:])}`",
        f"ds-comm {version('ds-comm')}, torch {torch.__version__}; {RANKS} ranks in one process.",
        f"The model of examples/train_lm.py, {options.layers} layers of {options.dim}, {options.steps} steps of "
        f"{RANKS} x {options.batch} x {options.length} bytes of",
        "Python's standard library, in float32; betas 0.9 and 0.99, no weight decay, bias correction, linear warm-up",
        "and cosine; eps 1e-8, or 1e-5 for the 1-bit optimizers, each beside Adam with the same eps. Best held-out",
        "loss in nats per byte: mean and range of seeds, at the best learning rate of a sweep by factors of 2. Bytes",
        "that a rank sends for each parameter in the whole run, warm-up included, and how many times fewer that is",
        "than fp32 all-reduce.",
        "",
        "| method | | lr | held out | range | beside Adam | bytes/parameter | fewer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in found.items():
        losses = [run.best for run in runs]
        base = statistics.fmean(run.best for run in found[METHODS[method].beside])
        lines.append(
            f"| {method} | {METHODS[method].settings} | {runs[0].lr:g} | {statistics.fmean(losses):.4f} "
            f"| {min(losses):.4f} ... {max(losses):.4f} | {100 * (statistics.fmean(losses) / base - 1):+.1f} % "
            f"| {max(run.sent for run in runs):.0f} | {adam[0].sent / max(run.sent for run in runs):.1f} |"
        )
    lines += ["", "Sweeps, first seed (the best loss before a divergence, where there is one):", ""]
    for method in found:
        swept = sorted(sweep_of(done, method).items())
        lines.append(f"- {method}: " + ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in swept))
    return [*lines, "", f"![losses]({picture})"]


def draw(done: Sequence[Run], seeds: int, path: Path) -> None:
    """Draw curves at the best learning rates, sweeps, and losses by volume."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, sweeps, volumes) = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    for index, method in enumerate(METHODS):
        if not (runs := at_best(done, method, seeds)):
            continue
        style = {"color": f"C{index}", "lw": 2.2 if method == "Adam" else 1.2}
        steps = [step for step, _ in runs[0].held_out]
        means = [statistics.fmean(run.held_out[at][1] for run in runs) for at in range(len(steps))]
        curves.plot(steps, means, label=method, **style)
        swept = sorted(sweep_of(done, method).items())
        sweeps.plot([lr for lr, _ in swept], [loss for _, loss in swept], ".-", **style)
        volumes.plot([run.sent for run in runs], [run.best for run in runs], "o", ms=4, color=style["color"])
    curves.set(xlabel="step", ylabel="held-out loss (nats per byte)", title=f"mean of {seeds} seeds", ylim=(1.7, 3.5))
    sweeps.set(xlabel="learning rate", title="sweeps, first seed", xscale="log", ylim=(1.7, 2.5))
    volumes.set(xlabel="bytes sent per parameter, whole run", title="each seed", xscale="log", ylim=(1.7, 2.5))
    for axes, ticks in (
        (sweeps, (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)),
        (volumes, (100, 200, 500, 1000, 2000, 4000)),
    ):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    for axes in (curves, sweeps, volumes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def read(folder: Path) -> tuple[Tensor, Tensor]:
    from train_lm import read_text

    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in read_text(folder, 4_000_000))
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="a file of finished runs, to which others are added")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of text")
    parser.add_argument("--out", type=Path, help="write the report as Markdown, and a picture beside it")
    parser.add_argument("--report-only", action="store_true", help="of the runs there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    options = Options(args.dim, args.layers, length=64, batch=4, steps=args.steps)
    if not args.report_only:
        run_all(args.runs, args.methods, args.seeds, read(args.data), options)
    if args.out is not None:
        done = read_runs(args.runs, options)
        args.out.write_text("\n".join(report(done, args.seeds, f"{args.out.stem}.png")) + "\n")
        draw(done, args.seeds, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
