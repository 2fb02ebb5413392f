"""A unit: parameters that become whole together and whose gradients leave together."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from torch import nn

from .flat import Flat

if TYPE_CHECKING:
    from ds_core.protocols import Handle


class Presence(Enum):
    """Where a unit's parameters are."""

    SHARDED = "sharded"  # after construction and after every reshard
    GATHERING = "gathering"  # asked for, maybe ahead of need
    WHOLE = "whole"  # readable; always, where parameters are replicated


class Unit:
    """See the module's line; the lifecycle is :class:`Presence`.

    Args:
        name: Fully qualified name of the module, for messages.
        modules: Modules before whose forward the parameters must be whole.
        flats: One buffer per data type and trainedness.
        sharded: Whether parameters are sharded between uses.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module], flats: Sequence[Flat], *, sharded: bool) -> None:
        self.name = name
        self.modules = list(modules)
        self.flats = list(flats)
        self.trained_flats = [flat for flat in flats if flat.gradient is not None]
        self.trained_params = [param for flat in self.trained_flats for param in flat.params]
        self.has_frozen = len(self.trained_flats) < len(self.flats)
        self.presence = Presence.SHARDED if sharded else Presence.WHOLE
        self._gathers: list[Handle] = []
        self._reductions: list[Handle] = []

    # Parameters #

    def begin_unshard(self) -> None:
        """Ask for the whole parameters."""
        if self.presence is not Presence.SHARDED:
            raise RuntimeError(f"unit {self.name!r} is {self.presence.value}, not sharded: nothing to gather")
        self._gathers = [flat.begin_gather() for flat in self.flats]
        self.presence = Presence.GATHERING

    def finish_unshard(self) -> None:
        """Wait for the whole parameters and make them the module's."""
        for gather in self._gathers:
            gather.wait()
        self._gathers.clear()
        for flat in self.flats:
            flat.attach()
        self.presence = Presence.WHOLE

    def reshard(self) -> None:
        """Give the whole parameters back; waits for a gather that is under way."""
        for gather in self._gathers:
            gather.wait()
        self._gathers.clear()
        for flat in self.flats:
            flat.detach()
            flat.release()
        self.presence = Presence.SHARDED

    # Gradients #

    def begin_reduce(self) -> None:
        """Start to sum the gradients over the ranks."""
        self._reductions = [flat.gradient.begin_reduce() for flat in self.trained_flats if flat.gradient]

    def finish_reduce(self) -> None:
        """Wait for the sums."""
        for flat, reduction in zip(self.trained_flats, self._reductions, strict=True):
            reduction.wait()
            if flat.gradient:
                flat.gradient.finish_reduce()
        self._reductions.clear()
