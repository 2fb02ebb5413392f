"""A rank in trouble ends all ranks of a pipeline, each with the cause, and with where it was itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ds_testkit.programs import Ended, run_program

pytestmark = pytest.mark.rung_c

PROGRAM = Path(__file__).with_name("troubled_program.py")
KILLED = -9
PLACE = r"at instruction \d+ of \d+, \S+: "
WAITING = r"waiting for message [xg]\d\.\d \(rank \d -> \d, tag \d+\)"


def launch(what: str, troubled: int) -> tuple[Ended, list[str]]:
    """Return how the troubled rank ended, and what the others printed."""
    ended = run_program(PROGRAM, [what, str(troubled)], 3)
    others = [process for rank, process in enumerate(ended) if rank != troubled]
    for process in others:
        assert process.code == 0, process.err
        assert process.out.startswith("PipelineError rank"), process.out
    return ended[troubled], [process.out for process in others]


@pytest.mark.parametrize("troubled", [0, 1, 2])
def test_a_killed_rank_is_named(troubled: int) -> None:
    ended, others = launch("kill", troubled)
    assert ended.code == KILLED
    for text in others:
        assert re.search(f"{PLACE}{WAITING}|message .* cannot (be sent|come)", text), text
        lost = "rank 0 is lost" if troubled == 0 else f"rank {troubled} has ended, or closed its connections"
        assert lost in text


@pytest.mark.parametrize("troubled", [0, 1, 2])
def test_an_exception_in_a_stage_ends_all_with_its_text(troubled: int) -> None:
    ended, others = launch("raise", troubled)
    cause = rf"rank {troubled} failed at instruction \d+ of \d+, F{troubled}\.2: ArithmeticError: the answer is not 42"
    assert re.match(f"PipelineError {cause}", ended.out)
    for text in others:
        assert re.search(f"rank . ends {PLACE}.*\nbecause {cause}", text), text


def test_on_a_hang_every_rank_says_what_it_waits_for() -> None:
    ended, others = launch("hang", 1)
    for text in others:
        assert re.search(f"{PLACE}{WAITING}, for ", text), text
    assert re.search(r"rank 1 ends .*\nbecause rank [02] failed .*" + WAITING, ended.out), ended.out


def test_a_shape_that_a_stage_cannot_take() -> None:
    ended, others = launch("shape", 0)
    for text in [ended.out, *others]:
        assert re.search(r"rank 0 failed .*, F0\.2: RuntimeError: mat1 and mat2 shapes cannot be multiplied", text)


def test_too_few_micro_batches_on_one_rank() -> None:
    ended, others = launch("few", 0)
    assert ended.out.startswith("ValueError the first stage needs 4 micro-batches; got 3")
    for text in others:
        assert "because rank 0 failed before its first instruction: ValueError: the first stage needs 4" in text


def test_ranks_that_disagree_on_the_number_of_micro_batches() -> None:
    ended, others = launch("count", 2)
    assert ended.out.startswith("ValueError rank 0 runs another schedule or model, 1f1b of 3 ranks and 4 micro-batches")
    for text in others:
        assert "because rank 2 failed before its first instruction: ValueError: rank 0 runs another" in text


def test_ranks_that_describe_different_models() -> None:
    ended, others = launch("model", 1)
    what = r"1f1b of 3 ranks and 4 micro-batches \(\w{12}\), "
    here, there = r"4 layers \(4 Linear\) cut at \[0, \d, \d, 4\]", r"3 layers \(3 Linear\) cut at \[0, 1, 2, 3\]"
    assert re.match(
        rf"ValueError rank 0 runs another schedule or model, {what}{there} .*; this rank .*{here}", ended.out
    )
    for text in others:
        assert "because rank 1 failed before its first instruction: ValueError: rank 0 runs another" in text


def test_a_value_that_does_not_travel() -> None:
    ended, others = launch("odd", 0)
    for text in [ended.out, *others]:
        assert re.search(r"rank 0 failed .*, SEND:x1\.0>1: TypeError: between stages travel tensors, numbers", text)
