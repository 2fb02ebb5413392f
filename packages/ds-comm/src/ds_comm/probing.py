"""Measures latency and bandwidth between ranks: ``ds comm probe``.

[Note: Probing]
Two things are timed in growing sizes, for each axis of the mesh. A *message*: ranks in pairs play ping-pong, and half a
turn counts. An *exchange*: all ranks send to all others at once, which is what reductions and gathers do; over gloo by
messages, like ds-zero, since its all-to-all takes longer than its bytes where a link carries both ways at once.

A time is the slowest rank's, and the median over rounds; sizes grow until one takes longer than it may. All groups of
an axis measure at the same time, as they communicate in training, and the slowest of them counts, so all ranks get the
same numbers.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from .backends import register_backends
from .links import ROUNDS, AxisLinks, Links, Sample, fit, measure
from .spawning import check_at_least, on_this_host


def measure_axes(
    group: dist.ProcessGroup | None,
    *,
    node_size: int | None = None,
    device: torch.device | None = None,
    limit: float = 0.1,
    rounds: int = ROUNDS,
) -> Links:
    """Measure; see :func:`ds_comm.probe`."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    device = device or torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    node_size = _size_of_nodes(group, size) if node_size is None else node_size
    if node_size < 1 or size % node_size:
        raise ValueError(f"{size} ranks are not a whole number of nodes of node_size = {node_size}; use a divisor")

    def slowest(seconds: float) -> float:
        longest = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
        return float(longest)

    axes = []
    for name, members in _axes(size, node_size, rank):
        axis = _Axis(group, members, device)
        messages = measure(axis.ping_pong, slowest, limit=limit, rounds=rounds)
        exchanges = measure(axis.exchange, slowest, limit=limit, rounds=rounds)
        halves = [Sample(each.nbytes, each.seconds / 2) for each in messages]
        costs = {"message": fit(halves), "exchange": fit(exchanges)}
        axes.append(AxisLinks(name=name, ranks=len(members), samples=exchanges, **costs))
    return Links(axes=tuple(axes))


def _size_of_nodes(group: dist.ProcessGroup | None, size: int) -> int:
    """Return how many ranks each host has, by the hosts' names."""
    names: list[str] = [""] * size
    dist.all_gather_object(names, platform.node(), group=group)
    per_host = names.count(names[0])
    if [names[rank // per_host * per_host] for rank in range(size)] != names or len(set(names)) * per_host != size:
        raise ValueError(
            f"every host must have as many ranks as every other, side by side; got ranks on {names}: give node_size"
        )
    return per_host


def _axes(size: int, node_size: int, rank: int) -> Iterator[tuple[str, list[int]]]:
    """Yield name and members of this rank's group along each axis that has several ranks."""
    if node_size in (1, size):
        if size > 1:
            yield "across nodes" if node_size == 1 else "within nodes", list(range(size))
        return
    first = rank // node_size * node_size
    yield "within nodes", list(range(first, first + node_size))
    yield "across nodes", list(range(rank % node_size, size, node_size))


class _Axis:
    """Messages between some ranks of a group.

    Args:
        group: The group.
        members: Those ranks, this one among them.
        device: Where messages lie.
    """

    def __init__(self, group: dist.ProcessGroup | None, members: Sequence[int], device: torch.device) -> None:
        self._group, self._members = group, members
        self._place = members.index(dist.get_rank(group))
        self._held = torch.zeros(0, dtype=torch.uint8, device=device)

    def ping_pong(self, nbytes: int) -> None:
        """Send to a partner and back; an odd rank out does nothing."""
        partner = self._place ^ 1
        if partner >= len(self._members):
            return
        message, peer = self._memory(nbytes), self._members[partner]
        if self._place < partner:
            dist.send(message, group=self._group, group_dst=peer)
        dist.recv(message, group=self._group, group_src=peer)
        if self._place > partner:
            dist.send(message, group=self._group, group_dst=peer)
        self._settle()

    def exchange(self, nbytes: int) -> None:
        """Send ``nbytes`` to the other members, in equal parts, and receive as many."""
        size = len(self._members)
        outgoing, incoming = self._memory(2 * size * -(-nbytes // (size - 1))).view(2, size, -1)
        if size == dist.get_world_size(self._group) and dist.get_backend(self._group) != "gloo":
            dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=self._group)
        else:
            others = [(place, peer) for place, peer in enumerate(self._members) if place != self._place]
            # receives first: over gloo what is sent before its receiver is known to wait takes nearly twice as long
            calls = [dist.P2POp(dist.irecv, incoming[at], group=self._group, group_peer=peer) for at, peer in others]
            calls += [dist.P2POp(dist.isend, outgoing[at], group=self._group, group_peer=peer) for at, peer in others]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
        self._settle()

    def _memory(self, nbytes: int) -> Tensor:
        """Return memory that is kept while sizes stay: fresh memory costs page faults."""
        if self._held.numel() != nbytes:
            self._held = torch.zeros(nbytes, dtype=torch.uint8, device=self._held.device)
        return self._held

    def _settle(self) -> None:
        if self._held.is_cuda:
            torch.cuda.synchronize(self._held.device)


# Command line #


def _rank(rank: int, store: str, options: argparse.Namespace) -> None:
    register_backends()
    torch.set_num_threads(1)
    dist.init_process_group(options.backend, rank=rank, world_size=options.ranks, store=FileStore(store, options.ranks))
    _probe_and_report(options)


def _join(options: argparse.Namespace) -> None:
    register_backends()
    dist.init_process_group(options.backend, timeout=timedelta(minutes=5))
    if options.backend == "nccl":
        torch.cuda.set_device(dist.get_node_local_rank())
    _probe_and_report(options)


def _probe_and_report(options: argparse.Namespace) -> None:
    links = measure_axes(None, node_size=options.node_size, limit=options.limit, rounds=options.rounds)
    if dist.get_rank() == 0:
        head = f"{dist.get_world_size()} ranks, {options.backend}, torch {torch.__version__}; "
        head += f"median of {options.rounds} rounds, latencies and bytes per second that a rank sends."
        sys.stdout.write(f"{head}\n\n{links.table() if links.axes else 'One rank: there is nothing to measure.'}\n")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ds_comm.commands probe") -> None:
    """Measure between the ranks this process was launched with, or between new ones on this host.

    Args:
        arguments: Of the command line; None: this process's.
        prog: What the command is called.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measures latency and bandwidth between ranks: those it was launched with by torchrun, or --ranks "
        "new ones on this host.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="on this host, where it was not launched with others")
    parser.add_argument("--backend", default="gloo", help="of torch.distributed, or ds_shm")
    parser.add_argument("--node-size", type=int, help="ranks of a node; by default those with one name of a host")
    parser.add_argument("--limit", type=float, default=0.1, help="seconds of a message, above which none is larger")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    check_at_least(parser, options, ranks=1, rounds=1)
    if dist.is_torchelastic_launched():
        _join(options)
    else:
        on_this_host(options.ranks, _rank, options)
