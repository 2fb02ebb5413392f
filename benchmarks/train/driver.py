"""Training steps of ds and its peers, interleaved.

Every contender has its own processes, which stay alive and wait while another runs; so its peak memory is its own,
and a burst of load on the machine meets all of them. One sample is one optimizer step between two barriers, on all
ranks at once.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import multiprocessing as mp
import os
import platform
import random
import resource
import statistics
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .contenders import CONTENDERS, Workload, backend_of

DEFAULT = [name for name in CONTENDERS if not name.startswith("ds-zero") and not name.endswith(("-gloo", "-shm"))]


def serve(pipe: Any, name: str, rank: int, world: int, store: str, work: Workload) -> None:
    """One rank of one contender: run as many steps as it is told, answer with their times."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    if backend_of(name) != "gloo":
        from ds_comm import register_backends

        register_backends()
    dist.init_process_group(backend_of(name), rank=rank, world_size=world, store=dist.FileStore(store, world))
    try:
        step = CONTENDERS[name](work)
    except Exception:
        pipe.send(traceback.format_exc())
        return
    pipe.send(None)
    while (count := pipe.recv()) is not None:
        times = []
        for _ in range(count):
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            times.append(time.perf_counter() - start)
        pipe.send((times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


class Contender:
    """All ranks of one contender."""

    def __init__(self, name: str, world: int, work: Workload) -> None:
        context = mp.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.name, self.times, self.rss, self.share = name, [], 0.0, 0.0
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, rank, world, store, work), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for rank, pipe in enumerate(self._pipes):
            error = pipe.recv()
            if error:
                raise SystemExit(f"{name}, rank {rank}:\n{error}")

    def run(self, steps: int, *, keep: bool) -> None:
        for pipe in self._pipes:
            pipe.send(steps)
        answers = [pipe.recv() for pipe in self._pipes]
        if keep:
            self.times += answers[0][0]
        self.rss = max(rss for _, rss in answers) / 2**20

    def measure_share(self, steps: int) -> None:
        """Run ``steps``, and see how much memory the ranks take together: pages that several map count once."""
        for pipe in self._pipes:
            pipe.send(steps)
        while not all(pipe.poll(0.02) for pipe in self._pipes):
            together = sum(_proportional_set_size(process.pid) for process in self._processes)
            self.share = max(self.share, together / len(self._processes) / 2**20)
        for pipe in self._pipes:
            pipe.recv()


def _proportional_set_size(pid: int) -> int:
    """Return a process's share of the memory that it maps, in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def table(contenders: list[Contender], work: Workload, world: int) -> str:
    """Return the results as Markdown."""
    medians = {c.name: statistics.median(c.times) for c in contenders}
    base, ddp = medians.get("floor"), medians.get("ddp")
    columns = ["contender", "median step (s)", "quartiles", "x floor", "overhead (ms)", "x DDP"]
    columns += ["peak RSS per rank (GiB)", "in steps, shared pages counted once (GiB)"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for c in contenders:
        low, _, high = statistics.quantiles(c.times, n=4)
        cells = [c.name, f"{medians[c.name]:.3f}", f"{low:.3f} to {high:.3f}"]
        cells.append(f"{medians[c.name] / base:.2f}" if base else "")
        cells.append(f"{(medians[c.name] - base) * 1e3:.0f}" if base else "")
        cells.append(f"{medians[c.name] / ddp:.2f}" if ddp else "")
        rows.append("| " + " | ".join([*cells, f"{c.rss:.2f}", f"{c.share:.2f}"]) + " |")
    numel = sum(p.numel() for p in _meta(work).parameters())
    title = (
        f"### {numel / 1e6:.1f} M parameters, {'bf16 (fp32 masters)' if work.bf16 else 'fp32'}, {world} ranks, "
        f"{work.tokens} tokens x {work.accumulation} micro-batches per rank, "
        f"{f'clipping at {work.clip}' if work.clip else 'no clipping'}, {len(contenders[0].times)} samples each"
    )
    return "\n".join([title, "", *rows, ""])


def _meta(work: Workload) -> torch.nn.Module:
    with torch.device("meta"):
        from ds_testkit.models import Transformer

        return Transformer(256, work.dim, work.layers, heads=work.dim // 64, context=work.tokens)


def header() -> str:
    """Return what ran, where and when."""
    packages = ("torch", "deepspeed", "ds-core", "ds-zero", "ds-kernels")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except Exception:  # a peer that is not installed is simply not in the table
            continue
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    lines = [
        f"# Training step, {datetime.date.today().isoformat()}",
        "",
        f"{', '.join(versions)}; Python {platform.python_version()}; {cpu}, {os.cpu_count()} cores, "
        "one thread per rank, gloo over loopback; the ranks of ds-1, ds-2 and ds-3 read each other's memory "
        "(`host_memory`, the default), those of ds-N-gloo send messages as the peers do; -shm: in a group of ds_shm.",
        "Interleaved: in each round every contender runs once, in random order; medians over all samples. "
        "Overhead is the median step minus the floor's (the same processes training without any synchronisation).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1])
    parser.add_argument("--clip", type=float, nargs="+", default=[0.0])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--contenders", nargs="+", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    text = header()
    print(text)
    for world in options.ranks:
        for dtype in options.dtypes:
            for accumulation in options.accumulation:
                for clip in options.clip:
                    work = Workload(options.dim, options.layers, options.tokens, accumulation, clip, dtype == "bf16")
                    text += "\n" + compare(options, world, work)
    if options.out:
        options.out.write_text(text)


def compare(options: argparse.Namespace, world: int, work: Workload) -> str:
    """Run one table."""
    contenders = [Contender(name, world, work) for name in options.contenders]
    for contender in contenders:
        contender.run(3, keep=False)
    for _ in range(options.rounds):
        for contender in random.sample(contenders, len(contenders)):
            contender.run(1, keep=False)  # refills caches after the others
            contender.run(options.steps, keep=True)
    for contender in contenders:
        contender.measure_share(2)
    text = table(contenders, work, world)
    print(text, flush=True)
    for contender in contenders:
        for process in contender._processes:
            process.kill()
    return text
