"""Ranks of one host read each other's memory: what it takes of mappings and descriptors, and when it is given back."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ds_testkit import Rank, RankPool
from torch import distributed as dist

from .helpers import join

pytestmark = [
    pytest.mark.rung_c,
    pytest.mark.skipif(not Path("/proc/self/ns/net").exists(), reason="windows need Linux"),
]


def reuse_of_addresses(rank: Rank) -> int:
    """Windows come and go; what is read must always be the new one's contents."""
    comm = join(rank)
    for turn in range(50):
        memory = comm.allocate(3000, torch.zeros(0)).fill_(float(turn + rank.rank))
        plain = torch.full((3000,), float(100 + turn + rank.rank))
        out = torch.empty(rank.size * 3000)
        comm.all_gather(out, memory, key=0).wait()
        assert out.view(rank.size, -1)[:, 7].tolist() == [float(turn + r) for r in range(rank.size)]
        del memory
        comm.all_gather(out, plain, key=1).wait()
        assert out.view(rank.size, -1)[:, 7].tolist() == [float(100 + turn + r) for r in range(rank.size)]
    gc.collect()
    comm.gather_rows(torch.zeros(1))  # carries the news of the last one
    comm.gather_rows(torch.zeros(1))
    return len(comm._mapped)


def test_freed_windows_are_unmapped(ranks: RankPool) -> None:
    assert max(ranks.run(reuse_of_addresses, size=2)) <= 2  # the spare ones of plain data


def open_descriptors(rank: Rank) -> int:
    comm = join(rank)
    before = len(os.listdir("/proc/self/fd"))
    memory = [comm.allocate(2000, torch.zeros(0)) for _ in range(20)]
    for key, window in enumerate(memory):
        comm.all_gather(torch.empty(rank.size * 2000), window, key=key).wait()
    return len(os.listdir("/proc/self/fd")) - before


def test_descriptors_are_closed_once_sent(ranks: RankPool) -> None:
    assert ranks.run(open_descriptors, size=2) == [0, 0]


def mappings_and_descriptors() -> tuple[int, int]:
    mapped = Path("/proc/self/maps").read_text().count("memfd:ds-zero")
    return mapped, len(os.listdir("/proc/self/fd"))


def used_and_dropped(rank: Rank) -> bool:
    gc.collect()
    before = mappings_and_descriptors()
    for sends in (True, False):
        comm = join(rank)
        memory = comm.allocate(2000, torch.zeros(0))
        if sends:
            comm.all_gather(torch.empty(rank.size * 2000), memory, key=0).wait()
        del comm, memory
        gc.collect()
    return mappings_and_descriptors() == before


def test_nothing_is_left_of_dropped_collectives(ranks: RankPool) -> None:
    assert ranks.run(used_and_dropped, size=2) == [True, True]


# Limits of descriptors #


def few_descriptors(rank: Rank) -> int:
    comm = join(rank, timeout=30.0)
    if (stand_in := os.fork()) == 0:  # a process of its own, whose limits nobody else has
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)  # root has no limit of descriptors that are on their way
            limit = len(os.listdir("/proc/self/fd")) + 40
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            windows = [comm.allocate(17 << 20, torch.zeros(0)) for _ in range(30)]
            if rank.rank == 0:
                time.sleep(1.0)  # meanwhile the others' pile up
            outs = [torch.empty(2 * rank.size) for _ in windows]
            calls = [
                comm.all_gather(out, own[:2], key=k) for k, (out, own) in enumerate(zip(outs, windows, strict=True))
            ]
            for call in calls:
                call.wait()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(stand_in, 0)[1])


def test_descriptors_on_their_way_may_be_many(ranks: RankPool) -> None:
    assert ranks.run(few_descriptors, size=4) == [0] * 4


def no_descriptor_left(rank: Rank) -> str:
    comm = join(rank)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    message = ""
    if rank.rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), limits[1]))
        held = []
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
    try:
        # rank 1's data are in a window, which rank 0 cannot take; it has nothing to send itself
        incoming = [torch.empty(0), torch.empty(4 * (rank.rank == 0))]
        outgoing = [torch.ones(4 * rank.rank), torch.empty(0)]
        call = comm.exchange(outgoing, incoming, key=0)
        if rank.rank == 0:
            call.wait()
    except OSError as error:
        message = str(error)
    finally:
        if rank.rank == 0:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    dist.monitored_barrier(rank.group, timedelta(seconds=20))
    return message


def test_a_process_without_descriptors_says_so(ranks: RankPool) -> None:
    assert "rank 0 has no file descriptor left for memory of rank 1" in ranks.run(no_descriptor_left, size=2)[0]


def descriptors_for(rank: Rank) -> int:
    comm = join(rank)
    before = len(os.listdir("/proc/self/fd"))
    tensors = [comm.allocate(100_000, torch.zeros(0)) for _ in range(1500)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 1500
    return len(os.listdir("/proc/self/fd")) - before


def test_small_tensors_share_windows(ranks: RankPool) -> None:
    assert max(ranks.run(descriptors_for, size=2)) <= 4
