"""Pipelines of two ranks: ds-pipe's schedules beside torch's and DeepSpeed's, and beside data parallelism.

    python -m benchmarks.pipeline                                  # equal stages, over loopback
    python -m benchmarks.pipeline --parts 2 1 2 1                  # stages that differ 2:1
    python -m benchmarks.pipeline --rate 1gbit                     # as root: two namespaces, joined by a slow link
    python -m benchmarks.pipeline --rate 100mbit --dim 1024 --parts 1 1 1 1 --contenders 1f1b zb_v DDP

All contenders live in the same two processes, one thread each, and take turns, in random order; a sample is one step
between two barriers, the optimizer's (SGD) included. Samples during which others used the machine do not count, where
enough are left. *floor*: each rank trains half of the layers on given inputs, both at once, and waits for nobody; *x
floor* is the median over rounds of how many times as long as the floor of the same round a step takes. Greedy schedules
are made for what the first steps of the run have cost. *bubble* leaves out the optimizer. *faults*: pages that the
system gives to a rank in one step; with --keep-freed all contenders keep freed memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_testkit import slow_link
from ds_testkit.programs import free_port

from .rank import run
from .work import MICRO_BATCHES

LIMIT = 225.0  # seconds
DEFAULT = ["gpipe", "1f1b", "interleaved", "bfs", "zb", "torch", "Deep"]


def locally(program: Sequence[str]) -> list[Any]:
    """Run both ranks on this host; return what each printed."""
    place = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            program, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=LIMIT)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in texts]


def table(options: argparse.Namespace, report: dict[str, Any]) -> str:
    """Return Markdown."""
    latency, speed = report.pop("link")
    numel = report.pop("numel")
    medians = {name: statistics.median(row["seconds"]) for name, row in report.items()}
    columns = [
        "contender",
        "median step (s)",
        "quartiles",
        "x floor of its round",
        "simulated (s)",
        "bubble",
        "simulated",
    ]
    columns += ["points", "faults", "samples"]
    lines = [
        f"### {numel / 1e6:.1f} M parameters, blocks {' + '.join(map(str, options.parts))}, {MICRO_BATCHES} "
        f"micro-batches of {options.tokens} tokens, {options.rate or 'loopback'}{', memory kept' * options.keep_freed}",
        "",
        f"A message of {4 * options.tokens * options.dim / 1e3:.0f} kB: {latency * 1e6:.0f} us + its bytes at "
        f"{speed / 1e6:.0f} MB/s, as messages went among the computations of the greedy schedule.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, row in report.items():
        low, _, high = statistics.quantiles(row["seconds"], n=4)
        cells = [name, f"{medians[name]:.3f}", f"{low:.3f} to {high:.3f}", f"{statistics.median(row['of floor']):.3f}"]
        if "measured bubble" in row:
            apart = row["measured bubble"] - row["simulated bubble"]
            cells += [f"{row['simulated seconds']:.3f}", f"{row['measured bubble']:.1%}"]
            cells += [f"{row['simulated bubble']:.1%}", f"{100 * apart:+.1f}"]
        cells += [""] * (len(columns) - 2 - len(cells)) + [f"{row['faults']:.0f}", str(len(row["seconds"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"greedy: `{report['greedy']['schedule'].splitlines()[0]}`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="in a micro-batch")
    parser.add_argument("--parts", type=int, nargs=4, default=[2, 2, 2, 2], help="blocks in each quarter of the model")
    parser.add_argument("--rate", help="of a slow link: 100mbit, 1gbit")
    parser.add_argument(
        "--contenders", nargs="+", default=["gpipe", "1f1b", "interleaved", "bfs", "zb", "torch", "Deep"]
    )
    parser.add_argument("--seconds", type=float, default=50.0, help="after which a last round ends")
    parser.add_argument("--keep-freed", action="store_true", help="ds_pipe.host_memory.keep_freed_memory")
    parser.add_argument("--out", type=Path, help="Markdown file to which the table is appended")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.pipeline", "--rank", *sys.argv[1:]]
    if options.rate:
        reason = slow_link.unusable()
        if reason is not None:
            sys.exit(f"no slow link here: {reason}")
        with slow_link.SlowLink(options.rate) as link:
            reports = link.run(program, timeout=LIMIT)
    else:
        reports = locally(program)
    head = (
        f"torch {version('torch')}, Python {platform.python_version()}; {platform.machine()}, {os.cpu_count()} cores, "
        f"a thread for each rank; {datetime.date.today().isoformat()}, load average {os.getloadavg()[0]:.1f}."
    )
    text = f"{head}\n\n{table(options, reports[0])}"
    print(text)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
