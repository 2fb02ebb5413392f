"""Programs run on several ranks, as a launcher would, in processes that cost no ``import torch`` each.

A server imports torch once and forks a process for each rank (multiprocessing's ``forkserver``). The process runs the
program as ``__main__`` and ends like an interpreter: an exception goes to ``sys.excepthook``, then come the functions
of ``atexit``.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PRELOADED = ["torch", "torch._dynamo", "ds_zero"]


class Ended(NamedTuple):
    """One process."""

    code: int  # negative: the signal that killed it
    out: str
    err: str
    seconds: float  # since the first one was started


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_program(program: Path, args: Sequence[str], size: int, limit: float = 60.0) -> list[Ended]:
    """Run ``program`` on ``size`` ranks, and wait for all of them.

    Args:
        program: A Python file; reads what ``torchrun`` would set from its environment.
        args: Its arguments.
        size: Number of processes.
        limit: Seconds after which what still runs is killed, which fails the test.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    folder = Path(tempfile.mkdtemp(prefix="ds-program-"))
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    started = time.monotonic()
    processes = []
    for rank in range(size):
        environment = {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        process = context.Process(target=_run, args=(str(program), list(args), environment, str(folder / str(rank))))
        process.start()
        processes.append(process)
    ends = [0.0] * size
    while any(process.is_alive() for process in processes) and time.monotonic() - started < limit:
        for rank, process in enumerate(processes):
            if process.is_alive():
                ends[rank] = time.monotonic() - started
        time.sleep(0.02)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    ended = []
    for rank, process in enumerate(processes):
        process.kill()
        process.join()
        out, err = ((folder / f"{rank}.{kind}").read_text() for kind in ("out", "err"))
        ended.append(Ended(process.exitcode or 0, out, err, ends[rank]))
        process.close()
    assert not hung, f"ranks {hung} did not end within {limit:.0f} s: {ended}"
    return ended


def _run(program: str, args: list[str], environment: dict[str, str], base: str) -> None:
    for fd, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{base}.{kind}", os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(environment)
    sys.argv = [program, *args]
    code = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except BaseException:  # as an interpreter does it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is one
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
