"""Units, parameters that communicate together, and which of them are whole.

[Note: Two units]
At most ``capacity`` (two) units are whole at a time, unless more are in use at once (nested modules). A unit that
has been used stays until its place is needed, so what ends the forward pass is still there when the backward pass
begins. The other place serves the next unit, asked for before this one computes. The order is a hint, taken from the
last pass: which unit followed which, separately for forward and backward. Where it turns out wrong a gather was
made in vain, and nothing else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .flat import Flat

if TYPE_CHECKING:
    from ds_core.protocols import Handle

_CAPACITY = 2


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
        self.num_trained = sum(len(flat.params) for flat in self.trained_flats)
        self._gradients = [flat.gradient for flat in flats if flat.gradient is not None]
        self.has_frozen = len(self.trained_flats) < len(self.flats)
        self.presence = Presence.SHARDED if sharded else Presence.WHOLE
        self.memory = {flat.whole.untyped_storage()._cdata for flat in flats}  # the storage objects parameters view
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

    def accept(self, flat: int, param: int) -> None:
        """Take over the gradient of one parameter, counted within one of the trained flats."""
        self._gradients[flat].accept(param)

    def begin_reduce(self) -> None:
        """Start to sum the gradients over the ranks."""
        self._reductions = [gradient.begin_reduce() for gradient in self._gradients]

    def finish_reduce(self) -> None:
        """Wait for the sums."""
        for gradient, reduction in zip(self._gradients, self._reductions, strict=True):
            reduction.wait()
            gradient.finish_reduce()
        self._reductions.clear()


class Phase(Enum):
    """Direction in which units follow each other."""

    FORWARD = "forward"  # from the first module call on
    BACKWARD = "backward"  # from the first gradient hook of a backward pass on


class Residency:
    """See [Note: Two units]."""

    def __init__(self) -> None:
        self._live: list[Unit] = []  # not sharded, least recently used first
        self.in_use: set[Unit] = set()  # read only, from outside
        self._held: set[Unit] = set()  # in use across passes
        self._follower: dict[tuple[Phase, Unit], Unit] = {}
        self._last: dict[Phase, Unit | None] = dict.fromkeys(Phase)
        self.peak_units = 0  # most units that held whole parameters at once

    def need(self, unit: Unit, phase: Phase) -> None:
        """Return with ``unit`` whole and in use, and with the next one asked for."""
        self._record(unit, phase)
        if unit.presence is Presence.SHARDED:
            self._begin(unit)
        if unit.presence is Presence.GATHERING:
            unit.finish_unshard()
        self._live.remove(unit)
        self._live.append(unit)
        self.in_use.add(unit)
        follower = self._follower.get((phase, unit))
        if follower is not None and follower.presence is Presence.SHARDED and self._make_room():
            self._begin(follower)

    def idle(self, unit: Unit) -> None:
        """Say that ``unit`` is not in use any more; it stays while there is room."""
        if unit not in self._held:
            self.in_use.discard(unit)

    def hold(self, units: Sequence[Unit]) -> None:
        """Return with ``units`` whole, and keep them so through all passes until :meth:`let_go`."""
        for unit in units:
            if unit.presence is Presence.SHARDED:
                self._begin(unit)
            self._held.add(unit)
            self.in_use.add(unit)
        for unit in units:
            if unit.presence is Presence.GATHERING:
                unit.finish_unshard()

    def let_go(self, units: Sequence[Unit]) -> None:
        """End what :meth:`hold` began."""
        self._held.difference_update(units)
        self.in_use.difference_update(units)

    def end_pass(self, phase: Phase) -> None:
        """Say that no further unit follows in this pass; nothing is in use after it but what is held."""
        last, self._last[phase] = self._last[phase], None
        if last is not None:
            # what once came after it belonged to another pass
            self._follower.pop((phase, last), None)
        self.in_use &= self._held

    def drop_all(self) -> None:
        """Reshard everything: the shards have new values."""
        self._held.clear()
        self.in_use.clear()
        for unit in self._live:
            unit.reshard()
        self._live.clear()

    def _record(self, unit: Unit, phase: Phase) -> None:
        last = self._last[phase]
        if last is not None and last is not unit:
            self._follower[phase, last] = unit
        self._last[phase] = unit

    def _begin(self, unit: Unit) -> None:
        self._make_room()
        unit.begin_unshard()
        self._live.append(unit)
        self.peak_units = max(self.peak_units, len(self._live))

    def _make_room(self) -> bool:
        """Reshard what has not been used for longest; False if all that is whole is in use."""
        while len(self._live) >= _CAPACITY:
            unused = next((unit for unit in self._live if unit not in self.in_use), None)
            if unused is None:
                return False
            unused.reshard()
            self._live.remove(unused)
        return True


class WatchedParams(dict[str, "nn.Parameter | None"]):
    """The parameters of one module; notices reads of those whose unit is not in use.

    Args:
        params: The parameters by name.
        unit_of: The unit of each.
        in_use: Units in use, kept up to date by their owner.
        outside: Says what a parameter reads as that belongs to another unit.
    """

    __slots__ = ("_in_use", "_outside", "_unit_of")

    def __init__(
        self,
        params: Mapping[str, nn.Parameter | None],
        unit_of: Mapping[nn.Parameter, Unit],
        in_use: Set[Unit],
        outside: Callable[[nn.Parameter, Unit], Tensor],
    ) -> None:
        super().__init__(params)
        self._unit_of = unit_of
        self._in_use = in_use
        self._outside = outside

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        if torch.compiler.is_compiling() or param is None:
            return param  # a compiled block reads what is its own
        unit = self._unit_of.get(param)
        return param if unit is None or unit in self._in_use else self._outside(param, unit)


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1
