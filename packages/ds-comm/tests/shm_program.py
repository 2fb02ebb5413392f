"""A program in which ranks of a shared-memory group end; started by test_shm_ends.py as several processes.

Argument: what happens, always to rank 1. Every rank writes what ended it, and after how many seconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import ds_comm
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from shm_cases import VERBS, draw


def reduce_for_ever() -> None:
    tensor = torch.zeros(2_000_000)
    while True:
        dist.all_reduce(tensor)


def die(rank: int) -> None:
    dist.barrier()
    if rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    reduce_for_ever()


def leave(rank: int) -> None:
    if rank == 1:
        dist.destroy_process_group()
    else:
        dist.barrier()


def be_interrupted(rank: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
        threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,)).start()
        try:
            dist.barrier()
        except KeyboardInterrupt:
            sys.stdout.write("interrupted\n")
        store.set("interrupted", "yes")
    else:
        store.wait(["interrupted"])
        dist.barrier()  # rank 1 had joined it
    dist.barrier()


def crowd(rank: int) -> None:
    rng = random.Random(8)
    size, world = dist.get_world_size(), dist.group.WORLD
    assert world is not None
    for _ in range(60):
        case = draw(rng, size, [0, 5, 1000, 40_000])
        got, wanted = VERBS[case.verb](case, rank, size, world)
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), case
    sys.stdout.write("done\n")


def fork(rank: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    if rank == 1:
        child = os.fork()
        if child == 0:
            try:
                dist.all_reduce(torch.zeros(1))
            except dist.DistBackendError as error:
                os.write(1, f"{error}\n".encode())
            world._channel.close()
            os._exit(0)
        os.waitpid(child, 0)
    dist.all_reduce(torch.zeros(1))


WHAT = {each.__name__: each for each in (die, leave, be_interrupted, fork, crowd)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    ds_comm.register_backends()
    dist.init_process_group("ds_shm")
    begun = time.monotonic()
    try:
        WHAT[sys.argv[1]](dist.get_rank())
    except dist.DistBackendError as error:
        sys.stdout.write(f"{time.monotonic() - begun:.1f} s: {error}\n")
        sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
