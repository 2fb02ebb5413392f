"""One level of ranks whose codes are chosen: it measures, tries, and reduces in what was chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .codecs.layout import FLOATS
from .coded.chosen import ChosenReduction
from .links import LinkCost, fit, measure
from .planning import EXACT

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Handle

    from .codec import Codec
    from .coded.reduction import Feedback
    from .traffic import Traffic

_PROBES = 1 << 19
"""The key of messages that measure."""
_SIZES = tuple(1 << power for power in range(10, 25, 2))
_LIMIT = 0.05  # seconds of a message after which none is larger


class Trial(NamedTuple):
    """What codes do to one buffer of this rank."""

    nbytes: Mapping[str, int]  # by code, exact among them: bytes that this rank sends
    lost: Mapping[str, float]  # by code: squares
    squares: float
    seconds: float  # of coding and decoding, with the slowest code


class Chooser(Protocol):
    """Who decides."""

    def begins(self, level: Level, key: int) -> bool:
        """Take note that a level reduces a key; return whether codes are to be tried on it."""

    def waited(self, seconds: float) -> None:
        """Take note of time spent in a reduction, or in trying codes."""


class Level:
    """Plays the role ``Reduction`` for one group of ranks; see [Note: Codes by measured links].

    Args:
        inner: Carries numbers and payloads.
        codecs: What may be chosen.
        traffic: Where sent bytes are counted.
        chooser: Is told of reductions.
        feedback: How errors are kept; None: they are not.
    """

    cost: LinkCost  # of an exchange

    def __init__(
        self,
        inner: Collectives,
        codecs: Mapping[str, Codec],
        traffic: Traffic,
        chooser: Chooser,
        *,
        feedback: Feedback | None,
    ) -> None:
        self.inner = inner
        self.trials: dict[int, Trial] = {}  # by key
        self._codecs, self._chooser = codecs, chooser
        self._reduction = ChosenReduction(inner, codecs, traffic, feedback=feedback)

    def probe(self, device: torch.device) -> LinkCost:
        """Return what exchanges cost, measured. All ranks call it."""
        inner, others = self.inner, self.inner.size - 1
        memory = inner.allocate(
            2 * inner.size * -(-_SIZES[-1] // others), torch.empty(0, dtype=torch.uint8, device=device)
        )

        def exchange(nbytes: int) -> None:
            part = -(-nbytes // others)
            pieces = memory[: 2 * inner.size * part].view(2, inner.size, part).unbind()
            outgoing, incoming = (list(each.unbind()) for each in pieces)
            inner.exchange(outgoing, incoming, key=_PROBES).wait()
            if memory.is_cuda:
                torch.cuda.synchronize(device)

        def slowest(seconds: float) -> float:
            return float(inner.gather_rows(torch.tensor([seconds], dtype=torch.float64, device=device)).amax())

        return fit(measure(exchange, slowest, sizes=_SIZES, limit=_LIMIT, rounds=3))

    def start(self, out: Tensor, full: Tensor, key: int) -> Handle:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``."""
        if self._chooser.begins(self, key) and full.dtype in FLOATS:
            start = time.perf_counter()
            self.trials[key] = self._try(full)
            self._chooser.waited(time.perf_counter() - start)
        start = time.perf_counter()
        handle = self._reduction.start(out, full, key)
        self._chooser.waited(time.perf_counter() - start)
        return _Timed(handle, self._chooser)

    def choose(self, codes: Mapping[int, str]) -> None:
        """Reduce these keys in these codes from now on. All ranks choose the same."""
        self._reduction.choose(codes)

    def state(self) -> Mapping[int, Tensor]:
        """Return by key this rank's slice of the sum of all ranks' errors. All ranks call it."""
        return self._reduction.state()

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Replace all errors."""
        self._reduction.load_state(state)

    @torch.no_grad()
    def _try(self, full: Tensor) -> Trial:
        size, numel = self.inner.size, full.numel() // self.inner.size
        others, error = size - 1, torch.empty(full.numel(), device=full.device)
        nbytes, lost, slowest = {EXACT: others * numel * full.element_size()}, {}, 0.0
        for name, codec in self._codecs.items():
            nbytes[name] = others * (codec.payload_bytes(numel) + 1)
            error.zero_()
            start = time.perf_counter()
            codec.encode(full, error=error)
            lost[name] = float(error.square().sum(dtype=torch.float64))  # waits for the device
            slowest = max(slowest, time.perf_counter() - start)
        squares = float(full.to(torch.float32).square().sum(dtype=torch.float64))
        return Trial(nbytes, lost, squares, 2 * slowest * others / size)


class _Timed:
    """A reduction whose waiting is told; plays the role ``Handle``."""

    __slots__ = ("_chooser", "_handle")

    def __init__(self, handle: Handle, chooser: Chooser) -> None:
        self._handle, self._chooser = handle, chooser

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written."""
        start = time.perf_counter()
        self._handle.wait()
        self._chooser.waited(time.perf_counter() - start)
