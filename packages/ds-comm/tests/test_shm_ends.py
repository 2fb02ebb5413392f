"""Ranks of a shared-memory group that end, leave or are interrupted; and many on few cores."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import ds_comm
import pytest
from ds_testkit.programs import Ended, run_program

pytestmark = [
    pytest.mark.rung_c,
    pytest.mark.skipif(find_spec(f"{ds_comm.__name__}._shm") is None, reason="needs the native module"),
]
PROGRAM = Path(__file__).parent / "shm_program.py"


def run(what: str, size: int) -> list[Ended]:
    return run_program(PROGRAM, [what], size)


def test_a_killed_rank_is_named_at_once() -> None:
    segments = os.listdir("/dev/shm")
    first, killed, third = run("die", 3)
    assert killed.code == -signal.SIGKILL
    for ended in (first, third):
        assert ended.code == 0, ended.err
        assert "rank 1 has ended while" in ended.out or "it was waiting for rank 1" in ended.out
        assert float(ended.out.partition(" s: ")[0]) < 5  # of a timeout of half an hour
    assert os.listdir("/dev/shm") == segments


def test_a_rank_that_leaves_is_named() -> None:
    first, second, third = run("leave", 3)
    assert second.code == 0
    for ended in (first, third):
        assert "rank 1 has destroyed this process group" in ended.out or "it was waiting for rank 1" in ended.out


def test_a_wait_can_be_interrupted() -> None:
    first, second = run("be_interrupted", 2)
    assert "rank 1 has given up" in first.out, first
    assert "interrupted" in second.out
    assert "a signal ended one of its collectives" in second.out


def test_a_forked_child_is_no_rank_and_takes_none_with_it() -> None:
    first, second = run("fork", 2)
    assert (first.code, first.out, second.code) == (0, "", 0), (first, second)
    assert "was forked from rank 1" in second.out


def test_more_ranks_than_cores() -> None:
    for ended in run("crowd", 8):
        assert ended.out.strip() == "done", ended.err
