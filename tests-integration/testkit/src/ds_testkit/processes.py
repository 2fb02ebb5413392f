"""Ranks as processes that stay alive from test to test, joined by gloo.

Starting a process costs an ``import torch``; so a pool starts once, and each test sends it a function. Functions and
arguments are found again in the child by module and name, so they stand at the top level of their test module.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Rank(NamedTuple):
    """What a function on a rank is told."""

    rank: int
    size: int
    group: dist.ProcessGroup  # the first ``size`` ranks of the pool


class RankError(AssertionError):
    """A function failed on a rank; the text holds the rank's traceback."""


class RankPool:
    """``world`` processes in one gloo world.

    Args:
        world: Number of processes.
        root: Folder relative to which pytest named the test modules.
        timeout: Seconds a collective or a whole call may take.
    """

    def __init__(self, world: int, root: str, timeout: float = 120.0) -> None:
        self.world = world
        self._root = root
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """Call ``function(Rank, *args)`` on the first ``size`` ranks at once; return what each returned."""
        size = self.world if size is None else size
        if not self._processes:
            self._start()
        message = pickle.dumps((function, size, args))
        for pipe in self._pipes[:size]:
            pipe.send_bytes(message)
        try:
            replies = self._collect(size)
        except RankError:
            self.close()  # the other ranks may hang in a collective: nothing of this world can be used again
            raise
        return [pickle.loads(reply) for reply in replies]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(prefix="ds-ranks-"), "store")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            settings = (rank, self.world, store, self._root, self.timeout)
            process = context.Process(target=_serve, args=(theirs, *settings), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, size: int) -> list[bytes]:
        deadline = time.monotonic() + self.timeout
        replies: list[bytes | None] = [None] * size
        while None in replies:
            for rank, pipe in enumerate(self._pipes[:size]):
                if replies[rank] is None and pipe.poll(0.005):
                    replies[rank] = self._receive(rank, pipe)
            if time.monotonic() > deadline:
                waiting = [rank for rank, reply in enumerate(replies) if reply is None]
                raise RankError(f"ranks {waiting} did not answer within {self.timeout:.0f} s")
        return [reply for reply in replies if reply is not None]

    def _receive(self, rank: int, pipe: Connection) -> bytes:
        try:
            succeeded, payload = pickle.loads(pipe.recv_bytes())
        except EOFError:
            raise RankError(f"rank {rank} died (exit code {self._processes[rank].exitcode})") from None
        if not succeeded:
            raise RankError(f"on rank {rank}:\n{payload}")
        assert isinstance(payload, bytes), type(payload)
        return payload


def _serve(pipe: Connection, rank: int, world: int, store: str, root: str, timeout: float) -> None:
    """Answer calls until the parent goes away."""
    sys.path.append(root)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=timedelta(seconds=timeout)
    )
    patience = timedelta(seconds=timeout)
    groups = {size: dist.new_group(list(range(size)), timeout=patience) for size in range(1, world + 1)}
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, size, args = pickle.loads(message)
            result = function(Rank(rank, size, groups[size]), *args)
            reply = (True, pickle.dumps(result))
        except Exception:  # the parent raises it again, with the rank
            reply = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
