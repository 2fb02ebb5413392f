"""The roles of tensor parallelism: a model whose layers are split over ranks, and whoever splits it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class SplitModel(Protocol):
    """What has become of a model, some of whose parameters are *blocks* now that this rank alone has."""

    @property
    def num_blocks(self) -> int:
        """Blocks that a layer consists of, on all ranks together."""

    @property
    def blocks(self) -> Mapping[nn.Parameter, int]:
        """This rank's blocks, each with its number. All other parameters all ranks have, with the same gradients."""

    @property
    def whole_names(self) -> Mapping[str, Sequence[str]]:
        """All names of each parameter of the model before it was split, by the first one, in the order of the model."""

    @property
    def whole_shapes(self) -> Mapping[str, torch.Size]:
        """Their shapes, by the first name."""

    def renewed(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return parameters with this rank's blocks in place of those that were split, which are not kept for it."""

    def parts(self, name: str) -> Sequence[str]:
        """Return the names of all blocks of what was the parameter ``name``; the name itself where it is whole.

        Each rank has equally many of them, in the order of the ranks.
        """

    def merged(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Return what was the parameter ``name`` from all of its :meth:`parts`."""


class PlannedSplit(Protocol):
    """A model, or a stage of one, that can be split and is as it was."""

    @property
    def unmatched(self) -> Sequence[str]:
        """Patterns of names that no module matches."""

    @property
    def layers(self) -> Sequence[str]:
        """Names that patterns can be for."""

    def split(self) -> SplitModel:
        """Split it, in place; all ranks call it. Its parameters get the first rank's values."""


class Splitter(Protocol):
    """Plays the role ``ds.tensor``, over the ranks it was built for."""

    def plan(self, module: nn.Module, *, keep: Collection[str] = ()) -> PlannedSplit:
        """Check that a model, or a stage of one, can be split. Changes nothing, and does not communicate.

        Args:
            module: It, in memory.
            keep: Names of parameters that other stages use, too, and that have to stay whole.
        """

    def no_match(self, patterns: Sequence[str], layers: Sequence[str]) -> str:
        """Return what to say about patterns that match nothing in a whole model, which has ``layers``."""
