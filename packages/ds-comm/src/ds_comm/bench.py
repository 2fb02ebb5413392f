"""Times collectives on this host: ``python -m ds_comm.bench --ranks 2 --out table.md``.

Every backend that is present runs each operation at each size, in turn, round by round, so that what else happens on
the machine meets all of them. Beside them stands what copying the same bytes costs, on all ranks at the same time and
without waiting for anybody: once for what must be read or written, twice for an all-reduce, which must read and write
everything. A time is the slowest rank's, and the median over rounds. The bus bandwidth is that of nccl-tests: the bytes
that the slowest link of a ring would carry, by time, comparable between numbers of ranks.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from .backends import register_backends
from .spawning import check_at_least, on_this_host

COPIES = "copies"
"""The contender that only copies."""

_SECONDS = 0.02  # a measurement lasts at least so long
_MAX_REPEATS = 500
_OLD_NAMES = {"reduce_scatter_single": "reduce_scatter_tensor", "all_gather_single": "all_gather_into_tensor"}


class Row(NamedTuple):
    """What was measured of one operation at one size."""

    op: str
    nbytes: int
    seconds: dict[str, float]  # by contender


class Op(NamedTuple):
    """An operation over buffers of one size: ``whole`` and the ``part`` of a rank."""

    run: Callable[[Tensor, Tensor, dist.ProcessGroup], object]
    bus: Callable[[int], float]  # bytes over the slowest link of a ring of so many ranks, by those of the whole
    copies: int  # of the whole, on each rank


def _torch(name: str) -> Callable[..., object]:
    """Return a function of ``torch.distributed`` by the name it has since torch 2.13."""
    return vars(dist).get(name) or vars(dist)[_OLD_NAMES[name]]  # type: ignore[no-any-return]


def _scatter(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    pieces = list(whole.view(-1, part.numel()).unbind()) if dist.get_rank(group) == 0 else None
    dist.scatter(part, pieces, group=group, group_src=0)


def _gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    pieces = list(whole.view(-1, part.numel()).unbind()) if dist.get_rank(group) == 0 else None
    dist.gather(part, pieces, group=group, group_dst=0)


def operations() -> dict[str, Op]:
    """Return what can be measured, by name."""

    def others(ranks: int) -> float:
        return (ranks - 1) / ranks

    return {
        "all_reduce": Op(lambda whole, _, group: dist.all_reduce(whole, group=group), lambda n: 2 * others(n), 2),
        "reduce_scatter": Op(
            lambda whole, part, group: _torch("reduce_scatter_single")(part, whole, group=group), others, 1
        ),
        "all_gather": Op(lambda whole, part, group: _torch("all_gather_single")(whole, part, group=group), others, 1),
        "all_to_all": Op(
            lambda whole, _, group: dist.all_to_all_single(torch.empty_like(whole), whole, group=group), others, 1
        ),
        "broadcast": Op(lambda whole, _, group: dist.broadcast(whole, group=group, group_src=0), lambda _: 1.0, 1),
        "reduce": Op(lambda whole, _, group: dist.reduce(whole, group=group, group_dst=0), lambda _: 1.0, 1),
        "gather": Op(_gather, others, 1),
        "scatter": Op(_scatter, others, 1),
    }


# On a rank #


def measure(names: Sequence[str], sizes: Sequence[int], groups: dict[str, dist.ProcessGroup], rounds: int) -> list[Row]:
    """Time operations in turn; all ranks call it.

    Args:
        names: Of operations.
        sizes: Bytes of the whole, in float32.
        groups: By contender.
        rounds: Measurements of each; their median counts.
    """
    ranks = dist.get_world_size()
    rows = []
    for nbytes in sizes:
        part = torch.zeros(max(nbytes // 4 // ranks, 1))
        whole, other = torch.zeros(part.numel() * ranks), torch.zeros(part.numel() * ranks)
        for name in names:
            op = operations()[name]
            calls: dict[str, Callable[[], object]] = {
                backend: _bound(op, whole, part, group) for backend, group in groups.items()
            }
            calls[COPIES] = _copying(whole, other, op.copies)
            repeats = {contender: _repeats(call) for contender, call in calls.items()}
            taken: dict[str, list[float]] = {contender: [] for contender in calls}
            for _ in range(rounds):
                for contender, call in calls.items():
                    taken[contender].append(_time(call, repeats[contender]))
            rows.append(Row(name, whole.nbytes, {each: statistics.median(times) for each, times in taken.items()}))
    return rows


def _bound(op: Op, whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    return lambda: op.run(whole, part, group)


def _copying(whole: Tensor, other: Tensor, copies: int) -> Callable[[], None]:
    def copy() -> None:
        for turn in range(copies):
            (other if turn % 2 else whole).copy_(whole if turn % 2 else other)

    return copy


def _repeats(call: Callable[[], object]) -> int:
    """Return how often a measurement calls ``call``; the same on all ranks."""
    call()  # touches memory
    return max(1, min(_MAX_REPEATS, int(_SECONDS / _time(call, 1))))


def _time(call: Callable[[], object], repeats: int) -> float:
    """Return the seconds of one call, on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    slowest = torch.tensor((time.perf_counter() - start) / repeats, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _rank(rank: int, store: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    register_backends()
    dist.init_process_group("gloo", rank=rank, world_size=options.ranks, store=FileStore(store, options.ranks))
    groups: dict[str, dist.ProcessGroup] = {name: dist.new_group(backend=name) for name in options.backends}
    rows = measure(options.ops, _sizes(options), groups, options.rounds)
    if rank == 0:
        _report(rows, options)
    dist.destroy_process_group()


# Reports #


def table(rows: Sequence[Row], ranks: int) -> str:
    """Return a table in Markdown: times, bus bandwidths, and times by those of the copies alone.

    Example:
        >>> print(table([Row("all_gather", 1 << 20, {"gloo": 2e-3, "copies": 1e-3})], ranks=2))
        | operation | size | gloo | GB/s | x copies | copies |
        |---|---|---|---|---|---|
        | all_gather | 1 MiB | 2.00 ms | 0.26 | 2.00 | 1.00 ms |
    """
    backends = [name for name in rows[0].seconds if name != COPIES]
    head = ["operation", "size", *(each for name in backends for each in (name, "GB/s", "x copies")), COPIES]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row.op, _shown_bytes(row.nbytes)]
        for name in backends:
            seconds = row.seconds[name]
            bus = operations()[row.op].bus(ranks) * row.nbytes / seconds / 1e9
            cells += [_shown_seconds(seconds), f"{bus:.2f}", f"{seconds / row.seconds[COPIES]:.2f}"]
        lines.append([*cells, _shown_seconds(row.seconds[COPIES])])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text.replace("| --- ", "|---").replace("|--- ", "|---").replace("--- |", "---|")


def _shown_bytes(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def _shown_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {options.ranks} ranks of one thread"
    text = f"{machine}, float32, median of {options.rounds} rounds.\n\n{table(rows, options.ranks)}\n"
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if options.picture:
        _draw(rows, options.ranks, options.picture)


def _draw(rows: Sequence[Row], ranks: int, path: Path) -> None:
    """Draw bus bandwidth over size; needs matplotlib."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.op for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        own = [row for row in rows if row.op == name]
        for contender in own[0].seconds:
            bus = [operations()[name].bus(ranks) * row.nbytes / row.seconds[contender] / 1e9 for row in own]
            axis.plot([row.nbytes for row in own], bus, label=contender, marker=".")
        axis.set(title=name, xscale="log", yscale="log", xlabel="bytes", ylabel="bus GB/s")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


# Command line #


def _sizes(options: argparse.Namespace) -> list[int]:
    sizes = [options.min]
    while sizes[-1] * options.factor <= options.max:
        sizes.append(sizes[-1] * options.factor)
    return sizes


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ds_comm.bench") -> None:
    """Start the ranks and wait for them.

    Args:
        arguments: Of the command line; None: this process's.
        prog: What the command is called.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Times collectives on this host.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ops", nargs="+", default=list(operations()), choices=list(operations()))
    parser.add_argument("--backends", nargs="+", default=["gloo", "ds_shm"])
    parser.add_argument("--min", type=int, default=1 << 10, help="bytes of the smallest message")
    parser.add_argument("--max", type=int, default=256 << 20, help="bytes of the largest")
    parser.add_argument("--factor", type=int, default=4, help="from one size to the next")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--picture", type=Path, help="a file for the picture; needs matplotlib")
    options = parser.parse_args(arguments)
    check_at_least(parser, options, ranks=1, min=4, factor=2, rounds=1)
    on_this_host(options.ranks, _rank, options)


if __name__ == "__main__":
    main()
