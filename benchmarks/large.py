"""A model that plain data parallelism could not hold here: built and trained on a few ranks at stage 3.

It is constructed without its memory (``ds_zero.deferred``), sharded tensor by tensor, and trained with activations
recomputed block by block. Each rank reports the most memory it ever held, after construction and after training,
beside the formula: 16 bytes per parameter over the ranks, and what is in flight.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing as mp
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ds_zero
import torch
import torch.distributed as dist
from ds_testkit.models import Transformer
from torch.utils.checkpoint import checkpoint

GIB = 2**30


class Report(NamedTuple):
    """What one rank saw; memory in bytes."""

    numel: int
    start: int  # resident before the model
    built: int  # most resident up to the end of construction
    trained: int  # most resident in all
    proportional: int  # resident at the end, pages shared by n processes counted as 1/n
    peers: int  # of the resident pages, those that belong to other ranks
    held: int  # by formula: parameters, moments and gradient sums
    transient: int  # by ds_zero's own count: whole units and leaves
    seconds: list[float]  # construction, then each step
    losses: list[float]


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rollup(field: str) -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def train(rank: int, options: argparse.Namespace, store: str, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=options.ranks, store=dist.FileStore(store, options.ranks))
    start, clock, seconds = resident(), time.perf_counter(), []
    torch.manual_seed(0)
    with ds_zero.deferred():
        model = Transformer(
            256, options.dim, options.layers, heads=options.dim // 64, context=options.tokens, dropout=options.dropout
        )
    sharded = ds_zero.shard(
        model, lambda groups: torch.optim.AdamW(groups, lr=3e-4, fused=True), config=ds_zero.ZeroConfig(stage=3)
    )
    sharded.wrap_blocks(partial(checkpoint, use_reentrant=False))
    seconds.append(time.perf_counter() - clock)
    built, losses = resident(), []
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randint(256, (1, options.tokens), generator=generator)
    for _ in range(options.steps):
        clock = time.perf_counter()
        loss = model(batch)
        loss.backward()
        sharded.step(min(1.0, 1.0 / sharded.grad_norm().value))
        seconds.append(time.perf_counter() - clock)
        losses.append(loss.item())
    memory = sharded.memory()
    shared = rollup("Shared_Clean") + rollup("Shared_Dirty")
    held = memory.param + memory.grad + memory.state
    numel = sum(param.numel() for param in model.parameters())
    answers.put(
        (rank, Report(numel, start, built, resident(), rollup("Pss"), shared, held, memory.transient, seconds, losses))
    )
    dist.barrier()


def table(reports: list[Report], options: argparse.Namespace) -> str:
    first = reports[0]
    formula = 16 * first.numel / options.ranks
    rows = [
        "| | " + " | ".join(f"rank {rank}" for rank in range(options.ranks)) + " |",
        "|---" * (len(reports) + 1) + "|",
    ]

    def row(name: str, values: list[str]) -> None:
        rows.append(f"| {name} | " + " | ".join(values) + " |")

    row("before the model (GiB)", [f"{r.start / GIB:.2f}" for r in reports])
    row("most resident, construction (GiB)", [f"{r.built / GIB:.2f}" for r in reports])
    row("most resident, training (GiB)", [f"{r.trained / GIB:.2f}" for r in reports])
    row("of it at the end: mapped by several ranks (GiB)", [f"{r.peers / GIB:.2f}" for r in reports])
    row("proportional share at the end (GiB)", [f"{r.proportional / GIB:.2f}" for r in reports])
    row("formula, 16 P / N (GiB)", [f"{formula / GIB:.2f}"] * len(reports))
    row("parameters, sums, moments as counted (GiB)", [f"{r.held / GIB:.2f}" for r in reports])
    row("whole units and leaves as counted (GiB)", [f"{r.transient / GIB:.2f}" for r in reports])
    row("construction (s)", [f"{r.seconds[0]:.0f}" for r in reports])
    row("steps (s)", [", ".join(f"{s:.1f}" for s in r.seconds[1:]) for r in reports])
    row("losses", [", ".join(f"{x:.3f}" for x in r.losses) for r in reports])
    numel = first.numel
    title = (
        f"# {numel / 1e6:.0f} M parameters on {options.ranks} ranks, {datetime.date.today().isoformat()}\n\n"
        f"torch {torch.__version__}, float32, stage 3, activations recomputed block by block, {options.tokens} tokens "
        f"per rank; {options.dim} wide, {options.layers} blocks. A full copy of the parameters is "
        f"{4 * numel / GIB:.2f} GiB; replicated training (16 bytes per parameter and rank) would take "
        f"{16 * numel * options.ranks / GIB:.1f} GiB on this host.\n"
    )
    return "\n".join([title, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    answers, store = context.Queue(), os.path.join(tempfile.mkdtemp(), "store")
    ranks = [context.Process(target=train, args=(rank, options, store, answers)) for rank in range(options.ranks)]
    for process in ranks:
        process.start()
    reports = dict(answers.get() for _ in ranks)
    for process in ranks:
        process.join()
    text = table([reports[rank] for rank in range(options.ranks)], options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
