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
    def unmatched(self) -> Sequence[str]:
        """Patterns of names that no module has matched."""

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
        """Return parameters with this rank's blocks in place of those that were split."""

    def parts(self, name: str) -> Sequence[str]:
        """Return the names of all blocks of what was the parameter ``name``; the name itself where it is whole.

        Each rank has equally many of them, in the order of the ranks.
        """

    def merged(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Return what was the parameter ``name`` from all of its :meth:`parts`."""


class Splitter(Protocol):
    """Plays the role ``ds.tensor``, over the ranks it was built for."""

    def split(self, module: nn.Module, *, keep: Collection[str] = ()) -> SplitModel:
        """Split a model, or a stage of one, in place; all ranks call it. Its parameters get the first rank's values.

        Args:
            module: It, in memory.
            keep: Names of parameters that other stages use, too, and that have to stay whole.
        """

    def no_match(self, patterns: Collection[str], module: nn.Module) -> str:
        """Return what to say about patterns that match nothing in the whole model."""
