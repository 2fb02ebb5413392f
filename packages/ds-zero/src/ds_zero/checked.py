"""Collectives that compare notes before they communicate: a mismatch is an error with both sides, not a hang.

[Note: Fingerprints]
Before each call a rank writes to the :class:`Board` what it is about to do: operation, unit and parameters, shape, data
type. It then reads the same *slot* of all other ranks, waits for those that are not there yet, and compares.

Where messages are matched by their order (NCCL), the slot is the number of the call, and ranks compare before they
communicate. Where they carry the buffer's key, ranks may issue calls in different orders, so the slot is operation, key
and how many such calls came before; ranks compare when they wait. If two ranks wait in different slots, and neither has
been in the other's, both would wait for ever: that is a mismatch, too.

Cost: of the order of ``size`` requests to the store for each call, and all ranks in step. For debugging.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from .board import Board, RankError
from .texts import shown

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Handle

T = TypeVar("T")

_POLL = 0.002  # seconds
_PEER_POLLS = 10  # of those, between two looks at where the others wait
_SHOWN = 4  # parameters in a message

_ADVICE = (
    "every rank has to run the same modules, on the same shapes, in the same order: look for a branch or a loop that "
    "only some ranks take, or for models that were built differently"
)


class Label(NamedTuple):
    """What a key stands for."""

    unit: str
    params: tuple[str, ...]


class Note(NamedTuple):
    """The fingerprint of one call."""

    op: str
    key: int  # -1: no buffer of its own
    call: int  # how many such calls came before
    shape: str
    unit: str
    params: list[str]
    phase: str  # only for people: ranks may be in different ones

    def matches(self, other: Note) -> bool:
        """Whether both ranks do the same."""
        return self[:-1] == other[:-1]

    def text(self) -> str:
        """Say it in words."""
        params = f" ({shown(self.params, limit=_SHOWN)})" if self.params else ""
        unit = f" of unit {self.unit!r}{params}" if self.unit else ""
        return f"{self.op}{unit}, {self.shape}, call {self.call}, {self.phase}"


class _Ticket(NamedTuple):
    """A call whose fingerprint was written."""

    slot: str
    note: Note


class CheckedHandle:
    """Plays the role ``Handle``."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written."""
        self._wait()


class CheckedCollectives:
    """Plays the role ``Collectives``; see [Note: Fingerprints].

    Args:
        inner: Does the work.
        board: Where ranks write.
        labels: What the keys stand for; filled once the units are known.
        who: Which ranks these are, in words; no two groups of ranks have the same.
        timeout: Seconds to wait for another rank to come to a call.
        ordered: Whether calls are matched by their order.
    """

    def __init__(
        self,
        inner: Collectives,
        board: Board,
        labels: Mapping[int, Label],
        *,
        who: str,
        timeout: float,
        ordered: bool,
    ) -> None:
        self.rank = inner.rank
        self.size = inner.size
        self._inner = inner
        self._board = board
        self._labels = labels
        self._who = who
        self._timeout = timeout
        self._ordered = ordered
        self._calls: Counter[tuple[str, int]] = Counter()
        self._num_calls = 0
        self._begun: set[str] = set()  # slots that not all ranks are known to have been in

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return memory of the inner collectives."""
        return self._inner.allocate(numel, like)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> CheckedHandle:
        """As the inner collectives do."""
        ticket = self._write("all_gather", key, list(out.shape), shard)
        return self._started(ticket, partial(self._inner.all_gather, out, shard, key=key))

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> CheckedHandle:
        """As the inner collectives do."""
        ticket = self._write("reduce_scatter", key, list(full.shape), full)
        return self._started(ticket, partial(self._inner.reduce_scatter, out, full, key=key))

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> CheckedHandle:
        """As the inner collectives do; each pair of ranks has its own number of elements, which is not compared."""
        ticket = self._write("exchange", key, "pieces", incoming[self.rank])
        return self._started(ticket, partial(self._inner.exchange, outgoing, incoming, key=key))

    def gather_rows(self, row: Tensor) -> Tensor:
        """As the inner collectives do."""
        self._compare(self._write("gather_rows", -1, list(row.shape), row))
        return self._inner.gather_rows(row)

    def broadcast(self, tensor: Tensor) -> None:
        """As the inner collectives do."""
        self._compare(self._write("broadcast", -1, list(tensor.shape), tensor))
        self._inner.broadcast(tensor)

    # Fingerprints #

    def _started(self, ticket: _Ticket, start: Callable[[], Handle]) -> CheckedHandle:
        if self._ordered:
            self._compare(ticket)
            return CheckedHandle(partial(self._explained, self._explained(start).wait))
        handle = self._explained(start)

        def wait() -> None:
            self._compare(ticket)
            self._explained(handle.wait)

        return CheckedHandle(wait)

    def _explained(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns; its error is another rank's where there is one."""
        try:
            return call()
        except RankError:
            raise
        except RuntimeError as error:
            failure = self._board.failure
            if failure is None:
                raise
            self._board.end(failure, error)

    def _raise_failure(self) -> None:
        failure = self._board.failure
        if failure is not None:
            self._board.end(failure)

    def _write(self, op: str, key: int, shape: object, sent: Tensor) -> _Ticket:
        self._raise_failure()
        call = self._calls[op, key]
        self._calls[op, key] += 1
        label = self._labels.get(key, Label("", ()))
        phase = "in a backward pass" if torch._C._current_graph_task_id() != -1 else "outside backward passes"
        what = f"{str(sent.dtype).removeprefix('torch.')} {shape}"
        note = Note(op, key, call, what, label.unit, list(label.params), phase)
        slot = f"{self._who}/{self._num_calls}" if self._ordered else f"{self._who}/{op}/{key}/{call}"
        self._num_calls += 1
        self._begun.add(slot)
        self._board.put(f"{slot}/{self.rank}", note)
        return _Ticket(slot, note)

    def _compare(self, ticket: _Ticket) -> None:
        """Return when all ranks are known to do what this one does.

        Raises:
            RankError: One does something else, or nothing within the timeout.
        """
        self._board.put(f"{self._who}/at/{self.rank}", ticket)
        missing = [rank for rank in range(self.size) if rank != self.rank]
        deadline, polls = time.monotonic() + self._timeout, 0
        while missing:
            missing = [rank for rank in missing if not self._has_come(rank, ticket)]
            if missing and polls % _PEER_POLLS == 0:
                self._look_elsewhere(missing, ticket, late=time.monotonic() > deadline)
            polls += 1
            if missing:
                time.sleep(_POLL)
        self._begun.discard(ticket.slot)
        self._board.put(f"{self._who}/at/{self.rank}", None)
        if self._board.count(f"{ticket.slot}/read") == self.size:  # nobody will look again
            for rank in range(self.size):
                self._board.drop(f"{ticket.slot}/{rank}")
            self._board.drop(f"{ticket.slot}/read")

    def _has_come(self, rank: int, ticket: _Ticket) -> bool:
        written = self._board.get(f"{ticket.slot}/{rank}")
        if written is None:
            return False
        if not ticket.note.matches(Note(*written)):
            self._fail(ticket.note, rank, Note(*written).text())
        return True

    def _look_elsewhere(self, missing: list[int], ticket: _Ticket, *, late: bool) -> None:
        """Raise if a rank has failed, waits in a slot that this one was not in, or does not come."""
        self._raise_failure()
        for rank in missing:
            at = self._board.get(f"{self._who}/at/{rank}")
            elsewhere = at is not None and at[0] not in self._begun and not self._was_in(Note(*at[1]))
            # it may have come in between: then it was not stuck there
            if elsewhere and not self._has_come(rank, ticket):
                self._fail(ticket.note, rank, Note(*at[1]).text())
        if late:
            where = "it has begun no other call" if at is None else f"it waits in {Note(*at[1]).text()}"
            self._fail(ticket.note, missing[-1], f"has not come within {self._timeout:g} s; {where}")

    def _was_in(self, note: Note) -> bool:
        return note.call < self._calls[note.op, note.key]

    def _fail(self, own: Note, rank: int, other: str) -> None:
        """Raise the same on all ranks."""
        sides = sorted([(self.rank, own.text()), (rank, other)])
        of = "" if self.size == self._board.size else f" of {self._who}"
        lines = "\n".join(f"  rank {who}{of}: {what}" for who, what in sides)
        self._board.end(self._board.fail(f"the collectives of the ranks do not match\n{lines}\n{_ADVICE}"))
