"""Ranks of one host read each other's memory: results, orders of calls, ends, limits."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.state import assert_same_bits
from ds_zero import links
from ds_zero.collectives import PeerCollectives, collectives_of
from ds_zero.host import HostCollectives, PeerLostError
from ds_zero.kernels import TorchKernels
from torch import Tensor
from torch import distributed as dist

from .helpers import Run, assemble_run, join

pytestmark = [
    pytest.mark.rung_c,
    pytest.mark.skipif(not Path("/proc/self/ns/net").exists(), reason="windows need Linux"),
]

CPU = torch.device("cpu")


def data_of(rank: int, call: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def put(comm: HostCollectives, values: Tensor, *, window: bool) -> Tensor:
    """Return ``values`` in a window, or in ordinary memory."""
    return comm.allocate(values.numel(), values).copy_(values) if window else values.clone()


# Results #


def calls_of_all_kinds(rank: Rank, dtype: torch.dtype) -> None:
    """Random calls, up to eight in flight, waited for in another order on each rank; checked against a formula."""
    comm, size = join(rank), rank.size
    shared, own = random.Random(5), random.Random(rank.rank)
    for turn in range(6):
        waiting = []
        for key in range(8):
            call, numel = 10 * turn + key, shared.choice([1, 7, 64, 5000])
            window, verb = own.random() < 0.6, shared.choice(["gather", "reduce", "exchange"])
            everyone = [data_of(r, call, size * numel, dtype) for r in range(size)]
            mine = put(comm, everyone[rank.rank], window=window)
            if verb == "gather":
                out = torch.empty(size * numel, dtype=dtype)
                handle = comm.all_gather(out, mine[:numel], key=key)
                want = torch.cat([data[:numel] for data in everyone])
            elif verb == "reduce":
                out, want = torch.empty(numel), torch.empty(numel)
                handle = comm.reduce_scatter(out, mine, key=key)
                TorchKernels().tree_sum(want, [data.view(size, -1)[rank.rank] for data in everyone])
            else:
                # rank r sends (r + to) % 3 elements to each: some nothing
                parts = [data.view(size, -1)[:, : (r + 1) % 3] for r, data in enumerate(everyone)]
                got = [torch.empty_like(part[rank.rank]) for part in parts]
                handle = comm.exchange(list(mine.view(size, -1)[:, : (rank.rank + 1) % 3].contiguous()), got, key=key)
                out, want = torch.cat(got), torch.cat([part[rank.rank] for part in parts])
            waiting.append((handle, out if verb != "exchange" else got, want, mine))
        own.shuffle(waiting)
        for handle, out, want, _ in waiting:
            handle.wait()
            assert torch.equal(torch.cat(out) if isinstance(out, list) else out, want)
    assert not comm._calls
    assert not comm._early


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_verb_in_any_order(ranks: RankPool, size: int, dtype: torch.dtype) -> None:
    ranks.run(calls_of_all_kinds, dtype, size=size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bits_are_those_of_messages(ranks: RankPool, stage: int) -> None:
    run = Run(stage=stage, num_micro_batches=4, compute=torch.bfloat16, steps=2)
    read = assemble_run(ranks, run, size=2)
    assert_same_bits(read, assemble_run(ranks, run._replace(settings={"host_memory": False}), size=2))


def gather_in_place(rank: Rank) -> None:
    comm = join(rank)
    whole = comm.allocate(rank.size * 10, torch.zeros(0))
    own = whole.view(rank.size, -1)[rank.rank].fill_(rank.rank)
    comm.all_gather(whole, own, key=0).wait()
    assert whole.view(rank.size, -1)[:, 3].tolist() == list(range(rank.size))


def test_a_shard_may_be_a_slice_of_the_result(ranks: RankPool) -> None:
    ranks.run(gather_in_place, size=4)


def exchange_of_beginnings(rank: Rank) -> None:
    comm = join(rank)
    sent = torch.arange(1.0, 9.0) * (1 + rank.rank)
    incoming = [torch.zeros(2 * rank.rank + 2) for _ in range(rank.size)]
    comm.exchange([sent[: 2 * r + 2] for r in range(rank.size)], incoming, key=0).wait()
    for peer, got in enumerate(incoming):
        assert torch.equal(got, torch.arange(1.0, 2 * rank.rank + 3) * (1 + peer))


def test_pieces_may_begin_at_one_address(ranks: RankPool) -> None:
    ranks.run(exchange_of_beginnings, size=4)


def broadcast_in_halves(rank: Rank, host_memory: bool) -> None:
    parts = [[0, 2], [1, 3]]
    comm = collectives_of(rank.group, TorchKernels(), device=CPU, host_memory=host_memory, parts=parts)
    for shape in ((3, 4), (), (0,)):
        tensor = torch.full(shape, float(rank.rank))
        comm.broadcast(tensor)
        assert torch.equal(tensor, torch.full(shape, float(rank.rank % 2)))
    spread = torch.full((4, 3), float(rank.rank)).t()
    comm.broadcast(spread)
    assert torch.equal(spread, torch.full((3, 4), float(rank.rank % 2)))


@pytest.mark.parametrize("host_memory", [True, False])
def test_a_broadcast_among_some_ranks_stays_among_them(ranks: RankPool, host_memory: bool) -> None:
    ranks.run(broadcast_in_halves, host_memory, size=4)


# Where it is chosen #


def chosen(rank: Rank, host_memory: bool, elsewhere: bool) -> tuple[type, float]:
    original = links._host
    if elsewhere and rank.rank == 1:
        links._host = lambda: "another host"
    try:
        comm = collectives_of(rank.group, TorchKernels(), device=CPU, host_memory=host_memory)
    finally:
        links._host = original
    row = comm.gather_rows(torch.tensor([float(rank.rank)]))
    assert row.flatten().tolist() == [float(r) for r in range(rank.size)]
    return type(comm), getattr(comm, "_timeout", 0.0)


def test_chosen_where_all_ranks_are_on_one_host(ranks: RankPool) -> None:
    assert ranks.run(chosen, True, False, size=2) == [(HostCollectives, ranks.timeout)] * 2


@pytest.mark.parametrize(("host_memory", "elsewhere"), [(True, True), (False, False)])
def test_messages_everywhere_else(ranks: RankPool, host_memory: bool, elsewhere: bool) -> None:
    assert ranks.run(chosen, host_memory, elsewhere, size=3) == [(PeerCollectives, 0.0)] * 3


def unnamed_host(rank: Rank) -> bool:
    original = links.Path
    if rank.rank == 1:
        links.Path = lambda _name: original("/nowhere")  # type: ignore[assignment,misc]
    try:
        return links.connect(rank.group, range(rank.size), 30.0) is None
    finally:
        links.Path = original  # type: ignore[misc]


def test_a_rank_that_cannot_name_its_host_keeps_nobody_waiting(ranks: RankPool) -> None:
    assert ranks.run(unnamed_host, size=2) == [True, True]


# Ends and mistakes #


def other_size(rank: Rank) -> str:
    comm = join(rank)
    try:
        comm.all_gather(torch.empty(2 * (8 + rank.rank)), torch.zeros(8 + rank.rank), key=4).wait()
    except RuntimeError as error:
        return str(error)
    return ""


def test_other_sizes_are_refused_by_name(ranks: RankPool) -> None:
    first, second = ranks.run(other_size, size=2)
    assert "rank 1 sends 36 bytes where rank 0 expects 32" in first
    assert "rank 0 sends 32 bytes where rank 1 expects 36" in second
    assert "fingerprint_timeout names both calls" in first


def absent(rank: Rank) -> str:
    comm = join(rank, timeout=0.3)
    message = ""
    if rank.rank != 2:
        start = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            comm.gather_rows(torch.zeros(4))
        assert 0.2 < time.monotonic() - start < 5.0
        message = str(caught.value)
    dist.monitored_barrier(rank.group, timedelta(seconds=20))
    return message


def test_a_rank_that_does_not_come_is_named(ranks: RankPool) -> None:
    messages = ranks.run(absent, size=3)
    for rank in (0, 1):
        assert f"rank {rank} waited 0.3 s for rank 2" in messages[rank]
        assert "not joined" in messages[rank]


def leaves_early(rank: Rank) -> str:
    """A copy of rank 1 takes its place and is killed; rank 0 returns what it is told."""
    comm = join(rank)
    if rank.rank == 1:
        if (stand_in := os.fork()) == 0:
            comm.gather_rows(torch.zeros(1000))
            os.kill(os.getpid(), signal.SIGKILL)
        for peer in comm._sockets.values():
            peer.close()
        assert os.waitpid(stand_in, 0)[1] == signal.SIGKILL
        return ""
    comm.gather_rows(torch.zeros(1000))
    with pytest.raises(PeerLostError) as caught:
        comm.gather_rows(torch.zeros(1000))
    return str(caught.value)


def test_a_killed_rank_is_named(ranks: RankPool) -> None:
    message, _ = ranks.run(leaves_early, size=2)
    assert message.startswith("rank 1 has ended while rank 0 waits for it")


def finishes_first(rank: Rank) -> bool:
    """Rank 0 has all it needs and closes its side; the others still need each other, and must not mind."""
    comm = join(rank)
    first, second = torch.empty(rank.size * 10), torch.empty(rank.size * 10)
    one = comm.all_gather(first, torch.ones(10), key=0)
    if rank.rank == 2:
        time.sleep(0.3)
    two = comm.all_gather(second, torch.ones(10), key=1)
    one.wait()
    two.wait()
    if rank.rank == 0:
        for peer in comm._sockets.values():
            peer.close()
    return bool(second.sum() == rank.size * 10)


def test_an_orderly_end_disturbs_nobody(ranks: RankPool) -> None:
    assert ranks.run(finishes_first, size=3) == [True] * 3


def knocks(rank: Rank) -> int:
    """While rank 0 waits for rank 1, a stranger comes with a wrong token and one with none."""
    if rank.rank == 1:
        original = links._HANDSHAKE

        class Impostor:
            size = original.size

            def pack(self, number: int, token: bytes) -> bytes:
                for greeting in (original.pack(number, bytes(16)), b"x"):
                    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                        stranger.connect(addresses[0])
                        stranger.send(greeting)
                return original.pack(number, token)

        addresses: list[bytes] = []
        connect = socket.socket.connect

        class Socket(socket.socket):
            def connect(self, address: bytes) -> None:  # type: ignore[override]
                addresses.append(address)
                connect(self, address)

        links._HANDSHAKE = Impostor()  # type: ignore[assignment]
        links.socket.socket = Socket  # type: ignore[misc]
    try:
        connected = links.connect(rank.group, range(rank.size), 30.0)
    finally:
        if rank.rank == 1:
            links._HANDSHAKE, links.socket.socket = original, Socket.__base__  # type: ignore[misc]
    assert connected is not None
    return len(connected)


def test_strangers_are_turned_away(ranks: RankPool) -> None:
    assert ranks.run(knocks, size=2) == [1, 1]


# Many calls #


def many_in_flight(rank: Rank) -> bool:
    """More records than a socket takes, before anybody reads one."""
    comm = join(rank, timeout=60.0)
    shards = [comm.allocate(4, torch.zeros(0)).fill_(float(rank.rank + key)) for key in range(2000)]
    outs = [torch.empty(4 * rank.size) for _ in shards]
    calls = [comm.all_gather(out, shard, key=key) for key, (out, shard) in enumerate(zip(outs, shards, strict=True))]
    for call in calls:
        call.wait()
    return all(
        out.view(rank.size, 4)[:, 0].tolist() == [float(r + key) for r in range(rank.size)]
        for key, out in enumerate(outs)
    )


@pytest.mark.parametrize("size", [2, 4])
def test_calls_without_number_may_be_in_flight(ranks: RankPool, size: int) -> None:
    assert ranks.run(many_in_flight, size=size) == [True] * size
