"""Checkpoints of an engine: all ranks agree on which one, and nothing is loaded before it is known to be whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ._control import Control, together
from .checkpoint import Checkpoint, CheckpointError, check_shapes, open_checkpoint, save, verify

if TYPE_CHECKING:
    from .protocols import Json, PartState


class Vault:
    """Saves and opens checkpoints together with the other ranks.

    Args:
        control: The ranks.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    def save(self, directory: str | os.PathLike[str], tag: str, state: PartState, run: Mapping[str, Json]) -> str:
        """Save; all ranks call it with the same tag. Returns the checkpoint's folder.

        Raises:
            ValueError: ``run`` holds something that is not JSON; the text names it.
            RankError: The ranks disagree on the tag, or saving failed on one of them.
        """
        _check_json(run, "")
        leader_tag = self._control.broadcast(tag)
        with together(self._control):
            if tag != leader_tag:
                raise ValueError(f"this rank saves as {tag!r}, rank 0 as {leader_tag!r}: use one tag on all ranks")
        return str(save(directory, tag, state=state, run=run, control=self._control))

    def open(
        self, directory: str | os.PathLike[str], tag: str | None, shapes: Mapping[str, torch.Size], *, strict: bool
    ) -> Checkpoint:
        """Open a checkpoint that fits a model of ``shapes``, after the ranks together have verified every byte of it.

        Raises:
            RankError: There is none, it is damaged, or it does not fit; on all ranks, with the reason.
        """
        control = self._control
        chosen: Json = None
        with together(control):
            if control.rank == 0:
                chosen = open_checkpoint(directory, tag).tag
        chosen = cast("str", control.broadcast(chosen))
        with together(control):
            checkpoint = open_checkpoint(directory, chosen)
            check_shapes(checkpoint, shapes, strict=strict)
            problems = verify(Path(directory) / chosen, share=(control.rank, control.size))
            if problems:
                raise CheckpointError("\n".join(problems))
        return checkpoint


def _check_json(value: object, path: str) -> None:
    """Raise unless ``value`` is JSON, naming the innermost place that is not."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_json(item, f"{path}.{key}" if path else str(key))
        return
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be saved in a checkpoint: {error}; checkpoints hold tensors of the model and JSON values "
            "(numbers, strings, lists, dictionaries), never pickled objects"
        ) from None
