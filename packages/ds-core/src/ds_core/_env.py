"""Environment variables: the only file of this wheel that reads or writes them.

The variables of a launch are those of ``torchrun``; ``ds run`` sets them for its workers through the same agent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

RANK = "RANK"
"""Index of this process among all processes of the job. Read. Absent when nothing launched this process."""

LOCAL_RANK = "LOCAL_RANK"
"""Index of this process on its machine, which is also the index of its device. Read."""

WORLD_SIZE = "WORLD_SIZE"
"""Number of processes of the job. Read."""

MASTER_ADDR = "MASTER_ADDR"
"""Host name of the process that the others meet at. Read."""

MASTER_PORT = "MASTER_PORT"
"""TCP port they meet at. Read."""

OMP_NUM_THREADS = "OMP_NUM_THREADS"
"""Threads of one process. Set by ``ds run``, for its workers only, where the user has not set it."""


class Launch(NamedTuple):
    """What the launcher told this process."""

    rank: int  # of this process, among all
    local_rank: int  # of this process, on its machine
    world_size: int  # number of processes
    master_addr: str  # where they meet
    master_port: int


def read_launch() -> Launch | None:
    """Read what the launcher told this process.

    Returns:
        The launch, or None when none of its variables is set: a plain ``python script.py``.

    Raises:
        ValueError: If only some of the variables are set, or one that must be a number is not.
    """
    names = (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
    given = {name: os.environ[name] for name in names if name in os.environ}
    if RANK not in given and WORLD_SIZE not in given:
        return None
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"the environment holds a part of a launch only: {given} is set, {', '.join(missing)} is not; "
            "start the script with 'ds run' or torchrun, or set all five"
        )
    return Launch(
        rank=_number(RANK, given[RANK]),
        local_rank=_number(LOCAL_RANK, given[LOCAL_RANK]),
        world_size=_number(WORLD_SIZE, given[WORLD_SIZE]),
        master_addr=given[MASTER_ADDR],
        master_port=_number(MASTER_PORT, given[MASTER_PORT]),
    )


def omp_num_threads() -> str | None:
    """Return what the user set as number of threads, or None."""
    return os.environ.get(OMP_NUM_THREADS)


@contextmanager
def inherited_omp_num_threads(count: int) -> Iterator[None]:
    """Let processes started within the block inherit ``count`` threads."""
    # torch's agent has no argument for the workers' environment: it hands down its own.
    before = os.environ.get(OMP_NUM_THREADS)
    os.environ[OMP_NUM_THREADS] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[OMP_NUM_THREADS]
        else:
            os.environ[OMP_NUM_THREADS] = before


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number >= 0, got {text!r}")
    return int(text)
