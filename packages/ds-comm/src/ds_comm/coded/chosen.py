"""Gradients, each buffer reduced in a code of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .handles import After
from .reduction import CodedReduction, Feedback

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from ..codec import Codec
    from ..traffic import Traffic


class ChosenReduction:
    """Reduce-scatters, exact until a code is chosen for a key.

    Args:
        inner: Carries numbers and payloads.
        codecs: What may be chosen, by name.
        traffic: Where sent bytes are counted.
        feedback: How errors are kept; None: they are not.
    """

    def __init__(
        self, inner: Collectives, codecs: Mapping[str, Codec], traffic: Traffic, *, feedback: Feedback | None
    ) -> None:
        self._inner = inner
        self._traffic = traffic
        self._coded = {name: CodedReduction(inner, codec, traffic, feedback=feedback) for name, codec in codecs.items()}
        self._chosen: dict[int, str] = {}
        self._owed: dict[int, Tensor] = {}  # by key: what this rank adds to its slice, once

    def choose(self, codes: Mapping[int, str]) -> None:
        """Reduce these keys in these codes from now on; all others are exact. All ranks choose the same, once."""
        self._chosen = dict(codes)
        self.load_state(self._owed)

    def start(self, out: Tensor, full: Tensor, key: int) -> After:
        """Sum slice ``rank`` of every rank's ``full``, as it was coded, into ``out``."""
        if key in self._chosen:
            return self._coded[self._chosen[key]].start(out, full, key)
        moved = full.nbytes // self._inner.size * (self._inner.size - 1)
        self._traffic.count(sent=moved, received=moved)

        def pay() -> None:
            if key in self._owed:
                out.add_(self._owed.pop(key))

        return After(self._inner.reduce_scatter(out, full, key=key), pay)

    def state(self) -> dict[int, Tensor]:
        """Return by key this rank's slice of the sum of all ranks' errors. All ranks call it."""
        found = dict(self._owed)
        for reduction in self._coded.values():
            found.update(reduction.state())
        return found

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Replace all errors; this rank adds them to its slices when they are next reduced."""
        for name, reduction in self._coded.items():
            reduction.load_state({key: owed for key, owed in state.items() if self._chosen.get(key) == name})
        self._owed = {key: owed for key, owed in state.items() if key not in self._chosen}
