"""Gradients, reduced by an exchange of payloads.

[Note: Error feedback]
What a code lacks of a gradient is kept, for each key, and added to the next one: sums over many steps lack only what
is kept now. What counts is the sum over ranks of their errors, so it survives a change of their number:
:meth:`CodedReduction.state` gives each rank its slice of that sum, and :meth:`CodedReduction.load_state` takes it as
what this rank still owes to its own slice. What is not finite is not kept: it has been sent, and its step is skipped.

[Note: Averaged errors]
With h the gradient plus the error e, and q what h was coded to, the next error is ``beta e + (1 - beta) (h - q)``: an
average, as LoCo has it, which damps the noise of single errors. Then only a part of what was lost is ever sent; with
beta = 0, all of it. Errors may be dropped after so many reductions of a buffer, which are counted from the start, or
from the last load.

If a code loses as much as there was (contraction factor 1 or more), errors could grow without end. Each payload ends
with a byte that says so of its sender; then the same numbers follow exactly, in a second exchange.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .handles import After, Scratch

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from ..codec import Codec
    from ..traffic import Traffic

_logger = logging.getLogger(__package__)

EXCHANGES = 1 << 18
"""Added to the keys of exchanged payloads: their messages are no other call's."""


class Feedback(NamedTuple):
    """How errors are kept; see [Note: Error feedback] and [Note: Averaged errors]."""

    beta: float = 0.0  # decay
    reset: int | None = None  # reductions of a buffer after which its errors are dropped


class CodedReduction:
    """Reduce-scatters of coded slices; see [Note: Compressed collectives] and [Note: Error feedback].

    Args:
        inner: Carries the payloads.
        codec: Of the gradients.
        traffic: Where sent bytes are counted.
        feedback: How errors are kept; None: not at all.
    """

    def __init__(self, inner: Collectives, codec: Codec, traffic: Traffic, *, feedback: Feedback | None) -> None:
        self._inner = inner
        self._codec = codec
        self._traffic = traffic
        self._feedback = feedback
        self._calls: Counter[int] = Counter()  # by key, since its errors were dropped
        self._scratch = Scratch(inner)
        self._others = [rank for rank in range(inner.size) if rank != inner.rank]
        self._errors: dict[int, Tensor] = {}  # by key: [size, n], float32
        self._owed: set[int] = set()  # keys of errors that this rank owes to its own slice
        self._told: set[int] = set()  # keys whose code was found to lose too much

    def start(self, out: Tensor, full: Tensor, key: int) -> After:
        """Sum slice ``rank`` of what every rank's ``full`` was coded to into ``out``."""
        size, rank = self._inner.size, self._inner.rank
        slices = full.view(size, -1)
        num_bytes = self._codec.payload_bytes(slices.shape[1])
        length = 2 * size * (num_bytes + 1)
        memory = self._scratch.borrow(length, full.device)
        outgoing, incoming = memory[:length].view(2, size, num_bytes + 1)
        errors = self._errors_of(key, slices)
        before = errors.clone() if errors is not None and self._feedback is not None and self._feedback.beta else None
        failed = self._encode(slices, errors, outgoing[:, :num_bytes])
        outgoing[:, num_bytes] = failed
        sent, received = ([memory[:0] if r == rank else rows[r] for r in range(size)] for rows in (outgoing, incoming))
        self._count(sent, received)

        def add() -> None:
            incoming[rank, num_bytes] = failed
            exact = self._exact(key, incoming[:, num_bytes], outgoing[:, :num_bytes], errors)
            if errors is not None and before is not None and self._feedback is not None:
                errors.lerp_(before, self._feedback.beta)
            self._sum(out, slices[rank], incoming[:, :num_bytes], exact)
            if errors is not None and key in self._owed:
                self._owed.discard(key)
                out.add_(errors[rank])
                errors[rank].zero_()
            self._scratch.give_back(memory)

        return After(self._inner.exchange(sent, received, key=EXCHANGES + key), add)

    def state(self) -> dict[int, Tensor]:
        """Return by key this rank's slice (1D, float32) of the sum of all ranks' errors. All ranks call it."""
        found = {}
        for key, errors in sorted(self._errors.items()):
            found[key] = torch.zeros_like(errors[0])
            self._inner.reduce_scatter(found[key], errors.view(-1), key=key).wait()
        return found

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Replace all errors by what :meth:`state` gave on any number of ranks: this rank's slice of each sum."""
        self._errors.clear()
        self._calls.clear()
        for key, owed in state.items():
            self._errors[key] = torch.zeros(self._inner.size, owed.numel(), dtype=torch.float32, device=owed.device)
            self._errors[key][self._inner.rank] = owed
        self._owed = set(state)

    def _errors_of(self, key: int, slices: Tensor) -> Tensor | None:
        if self._feedback is None:
            return self._errors.get(key)
        if key not in self._errors:
            self._errors[key] = torch.zeros(slices.shape, dtype=torch.float32, device=slices.device)
        elif self._calls[key] == self._feedback.reset:
            self._calls[key] = 0
            self._owed.discard(key)
            self._errors[key].zero_()
        self._calls[key] += 1
        return self._errors[key]

    def _encode(self, slices: Tensor, errors: Tensor | None, payloads: Tensor) -> Tensor | int:
        """Code the slices of the other ranks; return 1 where the code lost all there was, else 0."""
        if errors is None:
            for other in self._others:
                self._codec.encode(slices[other], payload=payloads[other])
            return 0
        whole, lost = slices.new_zeros((2,), dtype=torch.float32)
        for other in self._others:
            whole += torch.linalg.vector_norm(slices[other].to(torch.float32) + errors[other]).square()
            self._codec.encode(slices[other], error=errors[other], payload=payloads[other])
            lost += torch.linalg.vector_norm(errors[other]).square()
        errors.masked_fill_(~lost.isfinite(), 0)
        failed: Tensor = (lost >= whole) & (whole > 0) & whole.isfinite()
        return failed.to(torch.uint8)

    def _exact(self, key: int, flags: Tensor, payloads: Tensor, errors: Tensor | None) -> list[Tensor | None]:
        """Return by rank the numbers it sent because its code lost too much; None where its payload counts."""
        failed = [False] * self._inner.size if errors is None else [flag != 0 for flag in flags.tolist()]
        if errors is None or not any(failed):
            return [None] * self._inner.size
        self._tell(key, [rank for rank, flag in enumerate(failed) if flag])
        sent = [errors.new_empty(0)] * self._inner.size
        received = list(sent)
        for other in self._others:
            if failed[self._inner.rank]:
                # what was coded, to float32 rounding
                sent[other] = self._codec.decode(payloads[other], torch.empty_like(errors[other])).add_(errors[other])
                errors[other].zero_()
            if failed[other]:
                received[other] = torch.empty_like(errors[other])
        self._inner.exchange(sent, received, key=EXCHANGES + key).wait()
        self._count(sent, received)
        return [numbers if numbers.numel() else None for numbers in received]

    def _sum(self, out: Tensor, own: Tensor, payloads: Tensor, exact: Sequence[Tensor | None]) -> None:
        total = out.copy_(own) if out.dtype == torch.float32 else own.to(torch.float32, copy=True)
        for other in self._others:
            numbers = exact[other]
            if numbers is None:
                self._codec.accumulate(payloads[other], total)
            else:
                total += numbers
        if total is not out:
            out.copy_(total)

    def _count(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        self._traffic.count(sent=sum(piece.nbytes for piece in sent), received=sum(piece.nbytes for piece in received))

    def _tell(self, key: int, ranks: Sequence[int]) -> None:
        if key not in self._told:
            self._told.add(key)
            _logger.warning(
                "the code loses all there is of buffer %d on ranks %s (contraction factor 1 or more), so exact numbers "
                "were sent as well; choose a code with a smaller error",
                key,
                ", ".join(map(str, ranks)),
            )


def check_feedback(beta: float, reset: int | None) -> None:
    """Refuse values out of their bounds.

    Raises:
        ValueError: One is.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"error_beta must be at least 0 and below 1; got {beta!r}")
    if reset is not None and reset < 1:
        raise ValueError(f"error_reset must be at least 1, or null; got {reset!r}")
