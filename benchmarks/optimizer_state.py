"""Trains the example's model with AdamW's state in every number of bytes: do fewer bytes cost quality?

    python -m benchmarks.optimizer_state --out benchmarks/results/NAME.md

Weights and gradients of the model are bfloat16 in all runs. ``master``: float32 masters and moments outside the model,
by the same kernels, and weights that are the nearest bfloat16, halfway cases away from zero. ``split``: the master in
two more bytes beside each weight; its losses must be those of ``master``, bit by bit, in every step. ``int8``: besides,
moments as int8. ``stochastic``: no master, moments in bfloat16, both rounded stochastically. ``nearest``: torch's AdamW
on the bfloat16 weights, which rounds to nearest.

Learning rates are swept; each run is repeated with seeds that change the initial weights and the order of the data.
What counts is the loss on held-out text after the last step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from ds_kernels.backends.plain.state_codecs import split
from ds_kernels.optim import FusedAdam, StochasticRounding
from torch import Tensor, nn

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS = MappingProxyType({"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1})


class Options(NamedTuple):
    """Sizes of one run."""

    dim: int
    layers: int
    length: int  # bytes of a window
    batch: int
    steps: int


class Run(NamedTuple):
    """One training."""

    way: str
    lr: float
    seed: int
    losses: list[float]  # of each step
    held_out: float  # nats per byte
    seconds: float


class Text(NamedTuple):
    """Bytes to train on, and to judge by."""

    train: Tensor
    held_out: Tensor


# Ways to step: each takes the model's bfloat16 weights and a learning rate #

Step = Callable[[], None]


def master(weights: list[nn.Parameter], lr: float) -> Step:
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = FusedAdam(masters, lr=lr, **SETTINGS)

    def step() -> None:
        for full, weight in zip(masters, weights, strict=True):
            full.grad = weight.grad.float()
        optimizer.step()
        for full, weight in zip(masters, weights, strict=True):
            weight.detach().copy_(split(full.detach())[0])

    return step


def own(**storage: object) -> Callable[[list[nn.Parameter], float], Step]:
    return lambda weights, lr: FusedAdam(weights, lr=lr, **SETTINGS, **storage).step


def nearest(weights: list[nn.Parameter], lr: float) -> Step:
    return torch.optim.AdamW(weights, lr=lr, **SETTINGS, foreach=True).step


WAYS: Mapping[str, tuple[str, Callable[[list[nn.Parameter], float], Step]]] = MappingProxyType(
    {
        "master": ("16", master),
        "split": ("14", own()),
        "int8": ("8.1", own(moments="int8")),
        "stochastic": ("8", own(moments="bf16", rounding=StochasticRounding())),
        "nearest": ("8", nearest),
    }
)
"""Bytes per parameter with weight and gradient, and how to step."""

# Training #


def train(way: str, lr: float, seed: int, text: Text, options: Options) -> Run:
    """Train a model from its beginning."""
    from train_lm import Gpt

    start = time.perf_counter()
    torch.manual_seed(seed)
    model = Gpt(options.dim, options.layers, max(1, options.dim // 32), dropout=0.0).bfloat16()
    weights = list(model.parameters())
    step = WAYS[way][1](weights, lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(options.steps):
        at = torch.randint(len(text.train) - options.length - 1, (options.batch,), generator=generator)
        loss = loss_of(model, text.train, at, options.length)
        for weight in weights:
            weight.grad = None
        loss.backward()
        step()
        losses.append(loss.item())
    return Run(way, lr, seed, losses, judge(model, text.held_out, options.length), time.perf_counter() - start)


def loss_of(model: nn.Module, data: Tensor, at: Tensor, length: int) -> Tensor:
    windows = data[at[:, None] + torch.arange(length + 1)].long()
    return model(windows[:, :-1], windows[:, 1:])


@torch.no_grad()
def judge(model: nn.Module, data: Tensor, length: int, windows: int = 128) -> float:
    at = torch.arange(windows) * (len(data) - length - 1) // windows
    return statistics.fmean(loss_of(model, data, part, length).item() for part in at.split(32))


def read(folder: Path) -> Text:
    from train_lm import read_text

    parts = read_text(folder, limit=4_000_000)
    return Text(*(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts))


def runs(lrs: Sequence[float], seed: int, text: Text, options: Options) -> Iterator[Run]:
    for lr in lrs:
        for way in WAYS:
            run = train(way, lr, seed, text, options)
            print(f"{way} lr {lr:g} seed {seed}: held out {run.held_out:.4f}, {run.seconds:.1f} s", flush=True)
            yield run


# Report #


def report(done: list[Run], options: Options, picture: str) -> list[str]:
    """Return a table in Markdown: means over seeds, and differences from ``master`` with the same seed."""
    model = f"{options.layers} layers of {options.dim}"
    steps = f"{options.steps} steps of {options.batch} x {options.length} bytes"
    lines = [
        f"# AdamW's state in fewer bytes: quality, {date.today()}",
        "",
        f"`python -m benchmarks.optimizer_state {' '.join(sys.argv[1:])}`",
        f"ds-kernels {version('ds-kernels')}, torch {torch.__version__}, one thread of a processor with two cores.",
        f"The model of examples/train_lm.py, {model}, {steps} of Python's standard library;",
        "weights and gradients bfloat16 in all runs; AdamW, betas 0.9 and 0.95, weight decay 0.1. Held-out loss in",
        "nats per byte after the last step: mean and standard deviation over seeds; `beside master`: mean and",
        "largest difference from the run with a float32 master of the same seed. The ways are explained in",
        "benchmarks/optimizer_state.py.",
        "",
        same_bits(done),
        against_noise(done),
        "",
        "| lr | way | bytes per parameter | held out | over seeds | beside master | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for lr in sorted({run.lr for run in done}):
        base = {run.seed: run.held_out for run in done if run.lr == lr and run.way == "master"}
        for way, (num_bytes, _) in WAYS.items():
            found = {run.seed: run.held_out for run in done if run.lr == lr and run.way == way}
            spread = statistics.stdev(found.values()) if len(found) > 1 else float("nan")
            apart = [found[seed] - base[seed] for seed in found]
            lines.append(
                f"| {lr:g} | {way} | {num_bytes} | {statistics.fmean(found.values()):.4f} | {spread:.4f} "
                f"| {statistics.fmean(apart):+.4f} | {max(apart, key=abs):+.4f} |"
            )
    return [*lines, "", f"![loss]({picture})"]


def same_bits(done: list[Run]) -> str:
    losses = {(run.way, run.lr, run.seed): run.losses for run in done}
    pairs = [(losses["master", lr, seed], these) for (way, lr, seed), these in losses.items() if way == "split"]
    wrong = sum(full != these for full, these in pairs)
    steps = sum(len(these) for _, these in pairs)
    if wrong:
        return f"FAILED: {wrong} of {len(pairs)} runs with a split master have other losses than with a float32 one."
    return f"Split masters: all {steps} losses of {len(pairs)} runs have the bits of those with a float32 master."


def best_lr(done: list[Run]) -> float:
    lrs = sorted({run.lr for run in done})
    return min(lrs, key=lambda lr: statistics.fmean(r.held_out for r in done if r.lr == lr and r.way == "master"))


def against_noise(done: list[Run]) -> str:
    best = best_lr(done)
    found = {(run.way, run.seed): run.held_out for run in done if run.lr == best}
    seeds = sorted({seed for _, seed in found})
    apart = ", ".join(
        f"{way} {statistics.fmean(found[way, seed] - found['master', seed] for seed in seeds):+.4f}"
        for way in WAYS
        if way != "master"
    )
    spread = max(found["master", seed] for seed in seeds) - min(found["master", seed] for seed in seeds)
    return f"At the best learning rate, {best:g}, beside master: {apart}; seeds of master are {spread:.4f} apart."


def draw(done: list[Run], path: Path) -> None:
    """Draw training curves at the best learning rate, and what was reached at each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    best = best_lr(done)
    figure, (curves, sweep) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for index, way in enumerate(WAYS):
        style = {"color": f"C{index}", "ls": "--" if way == "split" else "-"}
        chosen = [run.losses for run in done if run.way == way and run.lr == best]
        means = [statistics.fmean(step) for step in zip(*chosen, strict=True)]
        smooth = [statistics.fmean(means[max(0, end - 10) : end]) for end in range(1, len(means) + 1)]
        curves.plot(smooth, lw=1.3, label=way, **style)
        for run in done:
            if run.way == way:
                sweep.plot(run.lr * (1 + 0.04 * (index - 2)), run.held_out, ".", color=style["color"])
    curves.set(xlabel="step", ylabel="loss (nats per byte)", title=f"training, lr {best:g}, mean over seeds")
    sweep.set(xlabel="learning rate", title="held out, each seed", xscale="log")
    rates = sorted({run.lr for run in done})
    sweep.set_xticks(rates, [f"{lr:g}" for lr in rates])
    sweep.set_xticks([], minor=True)
    for axes in (curves, sweep):
        axes.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of text")
    parser.add_argument("--out", type=Path, help="write the report as Markdown, and a picture beside it")
    args = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    options = Options(args.dim, args.layers, length=128, batch=8, steps=args.steps)
    text = read(args.data)
    done: list[Run] = []
    for seed in range(args.seeds):  # a report after each seed, so that a run that is cut short has one
        done += runs(args.lrs, seed, text, options)
        if args.out is not None:
            lines = report(done, options, f"{args.out.stem}.png")
            args.out.write_text("\n".join(lines) + "\n")
            draw(done, args.out.with_suffix(".png"))
    return int("FAILED" in same_bits(done))


if __name__ == "__main__":
    sys.exit(main())
