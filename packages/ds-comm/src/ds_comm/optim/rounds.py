"""Steps without communication, and the exchange that ends a round of them.

[Note: Rounds]
Within a round each rank steps by itself, and parameters differ between ranks. The *anchor* is where the round began,
the same bits everywhere. At the end ranks exchange how far they went, in one message, and go on from a common place:
the anchor plus something that all ranks decoded from the same payloads. So replicas do not drift apart by rounding.

A rank whose gradient is not finite makes no further local step in the round, and says so at its end: then all ranks
return to the anchor. ``synchronize`` ends a round early; states are saved and evaluated between rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..all_reduce import is_finite
from .base import FlatOptimizer


class RoundOptimizer(FlatOptimizer):
    """An optimizer with rounds of local steps; see [Note: Rounds]."""

    counters: ClassVar[Mapping[str, float]] = {"step": 0, "round_step": 0}

    _anchor: Tensor | None = None
    _spoiled = False  # a gradient of this round was not finite here

    @torch.no_grad()
    def synchronize(self) -> None:
        """End the round, if one is under way. All ranks call it.

        Raises:
            FloatingPointError: As ``step``.
        """
        self._prepare()
        if self.count("round_step") and not self.end_round():
            self._refuse()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, the same on all ranks. All ranks call it, between rounds.

        Raises:
            RuntimeError: A round is under way.
        """
        if self.count("round_step"):
            raise RuntimeError(
                "parameters and state are saved between rounds of local steps, when they are the same on all ranks; "
                f"got a call after {self.count('round_step')} steps of a round: call synchronize() on all ranks first"
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any number of ranks. All ranks call it with the same state."""
        self._spoiled = False
        super().load_state_dict(state_dict)

    def end_round(self) -> bool:
        """Exchange and begin anew; return False if all ranks went back to where the round began."""
        raise NotImplementedError(f"{type(self).__name__} has to say how a round ends")

    # Parts of a round #

    def anchor(self) -> Tensor:
        """Return where the round began; at its first step, that is here."""
        if self._anchor is None:
            self._anchor = self._flat.new()
        if not self.count("round_step"):
            self._flat.copy_params(self._anchor)
        return self._anchor

    def sound(self, values: Tensor) -> bool:
        """Return whether this rank may step: ``values``, and all of the round before, are finite."""
        self._spoiled = self._spoiled or not is_finite(values)
        return not self._spoiled

    def exchange(self, anchor: Tensor) -> bool:
        """Replace the message by its compressed mean; or return False, with parameters at the anchor."""
        if self._spoiled:
            self._message.fill_(float("nan"))
        self._spoiled = False
        self.set_counts(round_step=0)
        if self._reducer.reduce(self._message):
            return True
        self._flat.place_params(anchor)
        return False
