"""Ranks that hang, die, fail or are late: every other rank ends soon, and says which rank it was, and in which unit."""

from __future__ import annotations

import json
import os
import re
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.programs import Ended, run_program
from ds_zero.board import Board, RankError
from ds_zero.checked import CheckedCollectives, Label
from ds_zero.collectives import PeerCollectives
from ds_zero.kernels import TorchKernels
from ds_zero.watch import Aside, Watch

pytestmark = pytest.mark.rung_c

PROGRAM = Path(__file__).with_name("troubled_program.py")
KILLED = -9
ENDED = 70  # by its own watch


def launch(what: str, troubled: int, size: int = 3, **settings: Any) -> list[Ended]:
    return run_program(PROGRAM, [what, str(troubled), json.dumps(settings)], size)


def survivors(ended: list[Ended], troubled: int) -> list[Ended]:
    return [process for rank, process in enumerate(ended) if rank != troubled]


TRANSPORTS = pytest.mark.parametrize("host_memory", [True, False], ids=["host", "gloo"])


@TRANSPORTS
def test_a_killed_rank_is_named(host_memory: bool) -> None:
    ended = launch("kill", 1, stage=3, watchdog_timeout=3.0, host_memory=host_memory)
    assert ended[1].code == KILLED
    for process in survivors(ended, 1):
        assert process.code == 1, process.err
        assert "RankError: rank" in process.out
        assert "rank 1 is lost" in process.out
        assert "in the backward of unit 'blocks.1', micro-batch 3" in process.out


@TRANSPORTS
def test_an_exception_on_one_rank_ends_all_with_its_text(host_memory: bool) -> None:
    ended = launch("raise", 2, stage=2, watchdog_timeout=3.0, host_memory=host_memory)
    assert ended[2].code == 1
    assert "ArithmeticError: the answer is not 42" in ended[2].err
    for process in survivors(ended, 2):
        assert process.code == 1, process.err
        assert "RankError: rank 2 failed in the backward of unit 'blocks.1', micro-batch 3" in process.out
        assert "ArithmeticError: the answer is not 42" in process.out
        assert "in fail" in process.out  # the end of the traceback


@TRANSPORTS
def test_the_rank_that_holds_the_store_may_fail_too(host_memory: bool) -> None:
    ended = launch("raise", 0, stage=3, watchdog_timeout=3.0, host_memory=host_memory)
    for process in survivors(ended, 0):
        assert process.code == 1, process.err
        assert "RankError: rank 0 failed in the backward of unit 'blocks.1'" in process.out
        assert "ArithmeticError: the answer is not 42" in process.out


@TRANSPORTS
def test_a_late_rank_is_named_with_its_unit_and_ended(host_memory: bool) -> None:
    ended = launch("sleep40", 1, stage=3, watchdog_timeout=1.5, host_memory=host_memory)
    for process in survivors(ended, 1):
        assert process.code == 1, process.err
        assert "longer than watchdog_timeout = 1.5 s" in process.out
        assert "rank 1 is late: for " in process.out
        assert "in the backward of unit 'blocks.1', micro-batch 3, at troubled_program.py:" in process.out
    # it sleeps, and does not come to a collective where it could be told
    assert ended[1].code == ENDED
    assert ended[1].seconds < 20
    assert "rank 1 is ended, because none can go on: rank 0 has waited" in ended[1].err


def test_a_rank_that_is_late_by_half_a_minute() -> None:
    """The real thing once; it comes back, and is told why there is nothing left to do."""
    ended = launch("sleep32", 2, stage=2, watchdog_timeout=30.0)
    for process in survivors(ended, 2):
        assert process.code == 1, process.err
        assert "has waited 30." in process.out or "has waited 31." in process.out
        assert "rank 2 is late: for " in process.out
        assert "in the backward of unit 'blocks.1', micro-batch 3" in process.out
    assert ended[2].code == 1
    assert "rank 2 is late: for " in ended[2].out


def test_on_two_nodes_the_group_is_named() -> None:
    settings = {"mics_shard_size": 2, "watchdog_timeout": 20.0, "fingerprint_timeout": 20.0}
    for process in launch("nothing", 1, size=4, stage=3, **settings):
        assert (process.code, process.out) == (0, "trained\n"), process.err
    for process in launch("skip", 1, size=4, stage=3, **settings):
        assert process.code == 1, process.err
        # of a node or of those with one index on all nodes: whichever meets first
        group = r"(the node of ranks \d to \d|ranks \d, \d of their nodes)"
        assert re.search(rf"rank 0 of {group}: \w+ of unit 'blocks", process.out)


def test_a_rank_that_does_not_write_for_a_while_is_not_lost() -> None:
    """One long call may hold the lock of the interpreter, so that no other thread of the process runs."""
    for process in launch("hold18", 1, size=2, stage=2, watchdog_timeout=60.0):
        assert (process.code, process.out) == (0, "trained\n"), process.err


def test_a_program_that_has_been_told_is_left_alone() -> None:
    ended = launch("sleep1.3", 1, size=2, stage=2, watchdog_timeout=1.5, fingerprint_timeout=0.8, last_words=4.0)
    for process in ended:
        assert process.code == 1, process.err
        assert "has not come within 0.8 s" in process.out
        assert "last words" in process.out


class Silent:
    """A board of one rank; nobody else is there."""

    rank, size, told = 0, 1, False

    def __init__(self) -> None:
        self.written: list[str] = []

    def put(self, key: str, _value: object) -> None:
        self.written.append(key)


def test_a_forked_process_does_not_speak_for_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Silent()
    watch = Watch(cast("Board", board), 10.0)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        watch.close()
        watch._on_exception(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not board.written
    assert not board.told
    watch.close()
    assert board.written == ["beat/0"]


def test_bad_news_that_come_before_the_wait_are_not_missed() -> None:
    aside = Aside()
    aside.interrupt()
    with pytest.raises(InterruptedError):
        aside.run(lambda: 3)
    aside.close()


def test_what_was_waited_for_is_let_go() -> None:
    class Result:
        def wait(self) -> int:
            return 3

    result, aside = Result(), Aside()
    gone = weakref.ref(result)
    assert aside.run(result.wait) == 3
    del result
    thread = aside._thread
    assert thread is not None
    aside.close()
    thread.join(10.0)
    assert not thread.is_alive()
    assert gone() is None


def test_a_rank_that_has_left_is_named() -> None:
    ended = launch("leave", 1, stage=2, watchdog_timeout=2.0)
    assert ended[1].code == 0
    for process in survivors(ended, 1):
        assert process.code == 1, process.err
        assert "rank 1 has ended its program" in process.out


@pytest.mark.parametrize(
    "settings", [{"watchdog_timeout": 20.0}, {"watchdog_timeout": 20.0, "fingerprint_timeout": 20.0}]
)
def test_ranks_without_trouble_train(settings: dict[str, float]) -> None:
    for process in launch("nothing", 1, stage=3, **settings):
        assert (process.code, process.out) == (0, "trained\n"), process.err


@pytest.mark.parametrize("watchdog_timeout", [None, 20.0])
def test_a_layer_that_one_rank_skips_is_a_mismatch(watchdog_timeout: float | None) -> None:
    ended = launch("skip", 1, size=2, stage=3, watchdog_timeout=watchdog_timeout, fingerprint_timeout=20.0)
    for process in ended:
        assert process.code == 1, process.err
        assert process.seconds < 15  # it did not take a timeout
        assert "RankError: the collectives of the ranks do not match" in process.out
        assert "rank 0: all_gather of unit 'blocks.1' (blocks.1.first.weight, blocks.1.first.bias" in process.out
        assert re.search(r"rank 1: \w+ of unit 'blocks\.[023]' \(blocks", process.out)
        assert "look for a branch" in process.out


LABELS = {key: Label(f"blocks.{key}", (f"blocks.{key}.weight", f"blocks.{key}.bias")) for key in range(2)}


def mismatched(rank: Rank, ordered: bool, what: str) -> str:
    comm = CheckedCollectives(
        PeerCollectives(rank.group, TorchKernels(), range(rank.size)),
        Board(rank.group),
        LABELS,
        who="all ranks",
        timeout=20.0,
        ordered=ordered,
    )
    odd = rank.rank == 2
    full, shard = torch.ones(3 * rank.size), torch.ones(3)
    comm.all_gather(full, shard, key=0).wait()
    try:
        if what == "length":
            comm.gather_rows(torch.ones(5 if odd else 4))
        elif what == "dtype":
            comm.broadcast(torch.ones(4, dtype=torch.float64 if odd else torch.float32))
        else:  # "order"
            comm.all_gather(full, shard, key=1 if odd else 0).wait()
    except RankError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("what", "common", "odd"),
    [
        ("length", "gather_rows, float32 [4], call 0", "rank 2: gather_rows, float32 [5], call 0"),
        ("dtype", "broadcast, float32 [4]", "rank 2: broadcast, float64 [4]"),
        (
            "order",
            "all_gather of unit 'blocks.0' (blocks.0.weight, blocks.0.bias), float32 [9], call 1",
            "rank 2: all_gather of unit 'blocks.1' (blocks.1.weight, blocks.1.bias), float32 [9], call 0",
        ),
    ],
)
def test_both_sides_of_a_mismatch_are_named(ranks: RankPool, ordered: bool, what: str, common: str, odd: str) -> None:
    for text in ranks.run(mismatched, ordered, what, size=3):
        assert f"rank 0: {common}" in text or f"rank 1: {common}" in text, text
        assert odd in text, text
    if what == "order" and not ordered:
        ranks.close()  # messages that nobody takes stay in their group, and the next call in it may wait for ever


def test_a_rank_that_does_not_come_is_named() -> None:
    ended = launch("sleep3", 0, size=2, stage=2, fingerprint_timeout=1.5)
    for process in ended:
        assert process.code == 1, process.err
        assert "rank 0: has not come within 1.5 s; it has begun no other call" in process.out
        assert "rank 1: reduce_scatter of unit 'blocks.1'" in process.out


def test_a_rank_whose_store_has_gone_says_so() -> None:
    ended = launch("outlive", 1, size=2, stage=2, fingerprint_timeout=1.0)
    assert "rank 1: has not come within 1 s" in ended[0].out
    assert "RankError: rank 0 is lost, or the launcher" in ended[1].out
