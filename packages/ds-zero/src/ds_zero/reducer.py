"""Backward passes: when each unit's gradient leaves, and when a pass is over.

[Note: Backward pass]
A pass opens with the first hook that fires and ends when autograd has finished, whoever called ``backward()``; each
pass is one micro-batch. A unit's gradient leaves as soon as its last parameter has one. What has not left by the
end of the pass (unused parameters) leaves then, zeros included: every unit is reduced exactly once per pass on every
rank, so ranks cannot disagree on what is communicated. At most two reductions are in flight, which bounds the memory
of leaves and receive buffers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import cast

import torch

from .unit import Unit

_MAX_IN_FLIGHT = 2


class Reducer:
    """See [Note: Backward pass].

    Args:
        units: All units; their order is the order of what is left at the end of a pass.
        on_end: Called when a pass is over.
    """

    def __init__(self, units: Sequence[Unit], on_end: Callable[[], None]) -> None:
        self._units = [unit for unit in units if unit.trained_params]
        self._on_end = on_end
        self._open = False
        self._arrived: Counter[Unit] = Counter()
        self._sent: set[Unit] = set()
        self._late: set[Unit] = set()  # had a gradient after they were sent; learned, they wait for the end
        self._in_flight: deque[Unit] = deque()
        self.sync = True
        self.num_passes = 0  # since the last reset

    @property
    def is_open(self) -> bool:
        """Whether a pass has begun and not ended."""
        return self._open

    def open(self) -> None:
        """Note that a backward pass is running; called by every hook that can come first."""
        if not self._open:
            self._open = True
            queue = cast(
                "Callable[[Callable[[], None]], None]", torch.autograd.Variable._execution_engine.queue_callback
            )
            queue(self._end)

    def arrive(self, unit: Unit) -> bool:
        """Count one parameter gradient of ``unit``; True when it was the last one."""
        self.open()
        self._arrived[unit] += 1
        if self.sync and unit in self._sent:
            self._late.add(unit)
        complete = self._arrived[unit] == len(unit.trained_params)
        if complete and self.sync and unit not in self._late:
            self.send(unit)
        return complete

    def send(self, unit: Unit) -> None:
        """Start to reduce ``unit``; first finish the oldest reduction if there are too many."""
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._in_flight.popleft().finish_reduce()
        unit.begin_reduce()
        self._in_flight.append(unit)
        self._sent.add(unit)

    def reset(self) -> None:
        """Forget an unfinished pass, and start to count passes anew."""
        self._finish_all()
        self._open = False
        self._arrived.clear()
        self._sent.clear()
        self.num_passes = 0

    def _end(self) -> None:
        self._finish_all()
        if self.sync:
            for unit in self._units:
                if unit not in self._sent or unit in self._late:
                    self.send(unit)
            self._finish_all()
        self._arrived.clear()
        self._sent.clear()
        self._open = False
        self.num_passes += 1
        self._on_end()

    def _finish_all(self) -> None:
        while self._in_flight:
            self._in_flight.popleft().finish_reduce()
