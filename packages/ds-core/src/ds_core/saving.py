"""Checkpoints of an engine: all ranks agree on which one, and nothing is loaded before it is known to be whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ._control import Control, everybody, together
from ._json import decode_state, encode_state, plain
from .checkpoint import Checkpoint, CheckpointError, check_shapes, open_checkpoint, save, verify
from .checkpoint.folder import advice
from .checkpoint.load import Candidates
from .checkpoint.problems import listing
from .split_model import check_blocks

if TYPE_CHECKING:
    from .data import TrainLoader
    from .protocols import Json, LearningRateSchedule, PartState


class Vault:
    """Saves and opens checkpoints together with the other ranks.

    Args:
        control: The ranks.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    def save(
        self,
        directory: str | os.PathLike[str],
        tag: str,
        state: PartState,
        run: Mapping[str, object],
        schedule: LearningRateSchedule | None,
    ) -> str:
        """Save; all ranks call it with the same tag. Returns the checkpoint's folder.

        Raises:
            ValueError: ``run`` or the schedule's state holds something that is not JSON, or the tag is taken.
            RankError: On several ranks: it failed on one of them, or they disagree on the tag.
        """
        leader_tag = self._control.broadcast(tag)
        encoded: dict[str, Json] = {}
        with together(self._control):
            if tag != leader_tag:
                raise ValueError(f"this rank saves as {tag!r}, rank 0 as {leader_tag!r}: use one tag on all ranks")
            encoded = _encode_run(run, schedule)
        return str(save(directory, tag, state=state, run=encoded, control=self._control))

    def open(
        self, directory: str | os.PathLike[str], tag: str | None, check: Callable[[Checkpoint], None]
    ) -> Checkpoint:
        """Open a checkpoint that fits, after the ranks together have verified every byte of it.

        Args:
            directory: Holds one folder per checkpoint.
            tag: Which one; None: the last one that verifies, with a warning that says what was skipped.
            check: Raises unless the checkpoint fits; does not communicate.

        Raises:
            ValueError: There is no such tag, or it does not fit.
            CheckpointError: It is damaged, or there is none that is not.
            RankError: On several ranks: any of these, where not all of them found it.
        """
        control = self._control
        candidates = Candidates(directory)
        while True:
            with together(control):
                first = None
                if control.rank == 0:
                    first = candidates.next() if tag is None else open_checkpoint(directory, tag)
            chosen = cast("str", control.broadcast(None if first is None else first.tag))
            with together(control):
                checkpoint = open_checkpoint(directory, chosen)
                check(checkpoint)
            problems = self._verify(checkpoint.path)
            if not problems:
                if control.rank == 0:
                    candidates.report(checkpoint)
                return checkpoint
            if tag is not None:
                cure = advice(checkpoint.path, checkpoint.previous)
                raise CheckpointError(f"{checkpoint.path} is damaged:\n{listing(problems)}\n{cure}")
            candidates.skip(checkpoint, problems)

    def _verify(self, path: Path) -> list[str]:
        """Return what all ranks found, each having read its share."""
        control = self._control
        found: list[str] = []
        with together(control):
            found = verify(path, share=(control.rank, control.size))
        shares = everybody(control, [*found])
        # all ranks find what is wrong with the manifest or with a file's size
        return list(dict.fromkeys(problem for share in shares for problem in share))


def check_fits(
    opened: Checkpoint,
    *,
    state: PartState,
    strict: bool,
    schedule: LearningRateSchedule | None,
    loader: TrainLoader | None,
) -> None:
    """Raise unless a checkpoint fits the model, the schedule and the data loader of this run."""
    check_blocks(opened.scalars, state.scalars, opened.tag)
    check_shapes(opened, state.shapes, strict=strict)
    saved: Mapping[str, Any] = opened.run
    if schedule is not None:
        _check_schedule(schedule, saved["lr_scheduler"])
    if loader is not None and saved["data"] is not None:
        loader.check_state_dict(saved["data"])


def load_schedule(schedule: LearningRateSchedule, saved: Mapping[str, Any] | None) -> None:
    """Replace the schedule's state, if there is a saved one."""
    if saved is not None:
        schedule.load_state_dict(decode_state(saved["state"]))


def _check_schedule(schedule: LearningRateSchedule, saved: Mapping[str, Any] | None) -> None:
    name = type(schedule).__name__
    if saved is not None and saved["class"] != name:
        raise ValueError(
            f"the checkpoint holds the state of the schedule {saved['class']}, this run has {name}: use the same "
            "schedule, or load without its state (load_lr_scheduler_states=False)"
        )


def _encode_run(run: Mapping[str, object], schedule: LearningRateSchedule | None) -> dict[str, Json]:
    try:
        encoded = cast("dict[str, Json]", plain(run, ""))
        encoded["lr_scheduler"] = None
        if schedule is not None:
            state = encode_state(schedule.state_dict(), "lr_scheduler")
            encoded["lr_scheduler"] = {"class": type(schedule).__name__, "state": state}
    except ValueError as error:
        raise ValueError(
            f"{error}: it cannot be saved, because checkpoints hold tensors of the model and JSON values (numbers, "
            "strings, lists, dictionaries with strings as keys), never pickled objects"
        ) from None
    return encoded
