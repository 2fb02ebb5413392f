"""Stages of one rank as one model: what is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ds_core._control import make_control
from ds_core.axes import make_axes
from ds_core.chunks import Chunks
from torch import nn

from .plain import Plain


class Compiled(Plain):
    """A stage with or without blocks, that refuses a backend."""

    def __init__(self, *, has_blocks: bool) -> None:
        module = nn.Linear(2, 2)
        super().__init__(module, torch.optim.SGD(module.parameters()))
        self.has_blocks = has_blocks
        self.settings: list[dict[str, Any]] = []

    def compile(self, **settings: Any) -> None:
        assert self.has_blocks
        if settings["backend"] == "none":
            raise ValueError("there is no backend 'none'")
        self.settings.append(settings)


def chunks_of(*stages: Compiled) -> Chunks:
    return Chunks(dict(enumerate(stages)), make_control(None), make_axes(None, 1, "cpu"), num_micro_batches=1)


def test_stages_without_blocks_stay_as_they_are() -> None:
    first, second = Compiled(has_blocks=False), Compiled(has_blocks=True)
    chunks = chunks_of(first, second)
    assert chunks.has_blocks
    with pytest.raises(ValueError, match="there is no backend 'none'"):  # that is no stage without blocks
        chunks.compile(backend="none")
    assert not chunks.is_compiled
    chunks.compile(backend="eager")
    assert (first.settings, second.settings, chunks.is_compiled) == ([], [{"backend": "eager"}], True)
    with pytest.raises(RuntimeError, match="compiled already"):
        chunks.compile(backend="eager")


def test_without_any_block_it_is_said_what_to_do() -> None:
    chunks = chunks_of(Compiled(has_blocks=False))
    assert not chunks.has_blocks
    with pytest.raises(ValueError, match=r"no stage has anything to compile: .* in unit_classes"):
        chunks.compile(backend="eager")
