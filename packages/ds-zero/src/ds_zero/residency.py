"""Which units are whole: brought in before use, kept while there is room, prefetched in the recorded order.

[Note: Two units]
At most ``capacity`` (two) units are whole at a time, unless more are in use at once (nested modules). A unit that
has been used stays until its place is needed, so what ends the forward pass is still there when the backward pass
begins. The other place serves the next unit, asked for before this one computes. The order is a hint, taken from the
last pass: which unit followed which, separately for forward and backward. Where it turns out wrong a gather was
made in vain, and nothing else happens.
"""

from __future__ import annotations

from enum import Enum

from .unit import Presence, Unit

_CAPACITY = 2


class Phase(Enum):
    """Direction in which units follow each other."""

    FORWARD = "forward"  # from the first module call on
    BACKWARD = "backward"  # from the first gradient hook of a backward pass on


class Residency:
    """See [Note: Two units]."""

    def __init__(self) -> None:
        self._live: list[Unit] = []  # not sharded, least recently used first
        self._in_use: set[Unit] = set()
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
        self._in_use.add(unit)
        follower = self._follower.get((phase, unit))
        if follower is not None and follower.presence is Presence.SHARDED and self._make_room():
            self._begin(follower)

    def idle(self, unit: Unit) -> None:
        """Say that ``unit`` is not in use any more; it stays while there is room."""
        self._in_use.discard(unit)

    def end_pass(self, phase: Phase) -> None:
        """Say that no further unit follows in this pass; nothing is in use after it."""
        last, self._last[phase] = self._last[phase], None
        if last is not None:
            # what once came after it belonged to another pass
            self._follower.pop((phase, last), None)
        self._in_use.clear()

    def drop_all(self) -> None:
        """Reshard everything: the shards have new values."""
        self._in_use.clear()
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
            unused = next((unit for unit in self._live if unit not in self._in_use), None)
            if unused is None:
                return False
            unused.reshard()
            self._live.remove(unused)
        return True
