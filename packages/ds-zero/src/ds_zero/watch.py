"""A thread beside the training loop that ends this rank, with the reason, when another one is lost, late or failed.

[Note: Watch]
Each rank's thread writes every interval where its rank is (phase, unit, micro-batch, and what it waits for, if it does)
to the :class:`Board`, and looks whether a failure was noted there. A failure is noted by

- a rank whose program ends with an exception,
- a rank that has waited in a collective for longer than the timeout: it names the ranks that are not there, and where
  they were last seen,
- a rank whose collective raised because a connection was closed: it names the rank that has stopped to write.

Whoever finds a failure noted raises :class:`RankError` with its text. For that a rank may not be blocked where nothing
reaches it, so waits happen in a thread of their own (:class:`Aside`) while the caller waits for that one or for bad
news. A rank that is somewhere else altogether (in a collective of the user's own, in a loop without any) has a grace
time (the timeout, at most 30 s); then its process is ended with the text on standard error.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from .board import Board, RankError

logger = logging.getLogger(__package__)
T = TypeVar("T")

_BEATS = 10  # per timeout, at most one each second
_RANKS_PER_SECOND = 2000  # that a store can serve
_LOST_BEATS, _LOST_SECONDS = 10, 60.0  # a rank that has not written for so long is lost; a long call may hold the GIL
_READERS = 10  # ranks that look for lost ones while they wait; more would only load the store
_MAX_GRACE = 30.0  # seconds
_TAIL = 12  # lines of a traceback
_EXIT = 70  # EX_SOFTWARE


class Place(NamedTuple):
    """Where a rank is."""

    phase: str  # "construction", "forward", "backward" or "step"
    unit: str
    micro_batch: int  # forward passes of the whole model in training so far
    waiting: str  # for which collective; empty while it computes
    since: float  # time.monotonic()


class Beat(NamedTuple):
    """What a rank writes."""

    number: int
    phase: str
    unit: str
    micro_batch: int
    waiting: str
    seconds: float  # how long it has been there
    line: str  # of the program
    left: bool = False  # its program has ended in good order

    def where(self) -> str:
        """Say it in words."""
        unit = f" of unit {self.unit!r}" if self.unit else ""
        return f"in the {self.phase}{unit}, micro-batch {self.micro_batch}, at {self.line}"


News: TypeAlias = "dict[int, tuple[int, float]]"
"""Of each rank, the number of its last beat, and when that was new to the reader."""


class _Job:
    """A call that another thread makes."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.done = threading.Event()  # or interrupted
        self.finished = False
        self.result: Any = None
        self.error: BaseException | None = None


class Aside:
    """Makes blocking calls in a thread of its own, so that the caller can be interrupted.

    Example:
        >>> Aside().run(lambda: 3)
        3
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None: the last one
        self._current: _Job | None = None
        self._interrupted = False
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns, or raise what it raises.

        Raises:
            InterruptedError: :meth:`interrupt` was called before it was done, or before it was asked for.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="ds-zero waits", daemon=True)
            self._thread.start()
        job = self._current = _Job(call)
        if not self._interrupted:  # looked at after the job is known: whoever interrupts finds it, or is seen here
            self._jobs.put(job)
            job.done.wait()
        self._current = None  # it would keep what it waited for alive
        if job.error is not None:
            raise job.error
        if not job.finished:
            raise InterruptedError("interrupted while it waits")
        result: T = job.result
        return result

    def interrupt(self) -> None:
        """Let the caller go on, whatever becomes of its call; none is made any more."""
        self._interrupted = True
        job = self._current
        if job is not None:
            job.done.set()

    def close(self) -> None:
        """End the thread, after the call that it makes."""
        self._jobs.put(None)

    def _serve(self) -> None:
        torch.set_grad_enabled(False)
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.call()
                job.finished = True
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                job.error = error
            job.done.set()
            del job  # and with it what it waited for, while there is nothing to do


class Watch:
    """See [Note: Watch].

    Args:
        board: Where ranks write.
        timeout: Seconds a rank may wait in one collective.
    """

    def __init__(self, board: Board, timeout: float) -> None:
        self.rank = board.rank
        self._board = board
        self._timeout = timeout
        self._grace = min(_MAX_GRACE, timeout)
        self._interval = max(min(1.0, timeout / _BEATS), board.size / _RANKS_PER_SECOND)
        self._place = Place("construction", "", 0, "", time.monotonic())
        self._number = 0
        self._news: News = {}
        self._failure: str | None = None
        self._stop = threading.Event()
        self._aside = Aside()
        self._watched = threading.get_ident()
        self._before = sys.excepthook
        self._process = os.getpid()  # a forked one inherits the hook and the connection, which are not its own
        self._thread = threading.Thread(target=self._run, name="ds-zero watch", daemon=True)

    def start(self) -> None:
        """Begin to write, and to look; once."""
        if self._thread.is_alive():
            return
        self._write()
        sys.excepthook = self._on_exception
        self._thread.start()

    def close(self) -> None:
        """End in good order."""
        if self._stop.is_set() or os.getpid() != self._process:
            return
        self._stop.set()
        self._aside.close()
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._before
        try:
            self._write(left=self._failure is None)
        except RankError as gone:
            logger.debug("rank %d ends: %s", self.rank, gone)

    # Called by the training loop #

    def enter(self, phase: str, unit: str) -> None:
        """Note where this rank is."""
        self._place = Place(phase, unit, self._place.micro_batch, "", time.monotonic())

    def next_micro_batch(self) -> None:
        """Note that a forward pass of the whole model begins."""
        self._place = Place("forward", "", self._place.micro_batch + 1, "", time.monotonic())

    def blocking(self, what: str, call: Callable[[], T]) -> T:
        """Return what ``call`` returns, which waits for the other ranks; raises as :meth:`guarded` does."""
        before = self._place
        self._place = before._replace(waiting=what, since=time.monotonic())
        try:
            return self.guarded(what, partial(self._aside.run, call))
        finally:
            self._place = before._replace(since=time.monotonic())

    def guarded(self, what: str, call: Callable[[], T]) -> T:
        """Return what ``call`` returns.

        Raises:
            RankError: Another rank has failed, is late or lost.
        """
        self.check()
        try:
            return call()
        except RankError:
            raise
        except InterruptedError:
            self.check()
            raise
        except (RuntimeError, OSError) as error:
            self._board.end(self._explain(what, error), error)

    def check(self) -> None:
        """Raise :class:`RankError` if another rank has failed."""
        if self._failure is not None:
            self._board.end(self._failure)

    # The thread #

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._write()
                failure = self._board.failure or self._found()
                if failure is not None:
                    failure = self._board.fail(failure)
                    self._board.acknowledge()
            except RankError as gone:
                # a rank that waits for nobody may be the last one to end, in good order
                failure = str(gone) if self._place.waiting else None
            if failure is not None:
                self._end(failure)
                return

    def _write(self, *, left: bool = False) -> None:
        self._number += 1
        place = self._place
        beat = Beat(self._number, *place[:4], round(time.monotonic() - place.since, 1), self._line(), left)
        self._board.put(f"beat/{self.rank}", beat)

    def _line(self) -> str:
        """Return the innermost line of the program that is neither torch's nor ours."""
        frame = sys._current_frames().get(self._watched)
        stack = traceback.extract_stack(frame) if frame is not None else []
        inner = (os.path.dirname(torch.__file__), os.path.dirname(__file__), os.path.dirname(threading.__file__))
        lines = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in stack if not f.filename.startswith(inner)]
        return lines[-1] if lines else "its end"

    def _found(self) -> str | None:
        """Return what is wrong, as far as this rank sees."""
        place = self._place
        waited = time.monotonic() - place.since if place.waiting else 0.0
        # one after the other: the first that finds something spares the others the search
        waited -= min(self.rank, _READERS) * self._interval
        if waited > self._timeout:
            return self._report(place)
        if waited > self._lost_seconds / 2 and self.rank < _READERS:
            lost = self._lost(self._news, self._lost_seconds)
            return self._obituary(lost, place.waiting) if lost else None
        self._news = {}
        return None

    @property
    def _lost_seconds(self) -> float:
        return max(_LOST_BEATS * self._interval, min(_LOST_SECONDS, self._timeout))

    def _end(self, failure: str) -> None:
        self._failure = failure
        self._aside.interrupt()
        if not self._stop.wait(self._grace) and not self._board.told:
            sys.stderr.write(f"rank {self.rank} is ended, because none can go on: {failure}\n")
            sys.stderr.flush()
            os._exit(_EXIT)

    # What is said #

    def _read(self) -> dict[int, Beat | None]:
        found = {rank: self._board.get(f"beat/{rank}") for rank in range(self._board.size) if rank != self.rank}
        return {rank: None if beat is None else Beat(*beat) for rank, beat in found.items()}

    def _lost(self, news: News, seconds: float) -> dict[int, Beat | None]:
        """Return the ranks that have ended, or have not written for so long; ``news`` is kept from look to look."""
        lost, now = {}, time.monotonic()
        for rank, beat in self._read().items():
            number = 0 if beat is None else beat.number
            known, since = news.get(rank, (-1, now))
            if number != known:
                news[rank] = (number, now)
            if (number == known and now - since >= seconds) or (beat is not None and beat.left):
                lost[rank] = beat
        return lost

    def _obituary(self, lost: dict[int, Beat | None], waiting: str) -> str:
        lines = [f"rank {self.rank} waits for {waiting}"]
        for rank, beat in sorted(lost.items()):
            if beat is None:
                lines.append(f"rank {rank} is lost: it has never been seen")
            elif beat.left:
                lines.append(f"rank {rank} has ended its program")
            else:
                lines.append(f"rank {rank} is lost (killed?): last seen {beat.where()}")
        return "\n".join(lines)

    def _report(self, place: Place) -> str:
        seconds = time.monotonic() - place.since
        lines = [
            f"rank {self.rank} has waited {seconds:.1f} s for {place.waiting}, in the {place.phase} of micro-batch "
            f"{place.micro_batch}, longer than watchdog_timeout = {self._timeout:g} s"
        ]
        for rank, beat in self._read().items():
            if beat is None:
                lines.append(f"rank {rank} has never been seen")
            elif beat.left:
                lines.append(f"rank {rank} has ended its program")
            elif beat.waiting:
                lines.append(f"rank {rank} waits for {beat.waiting}, for {beat.seconds:.1f} s, {beat.where()}")
            else:
                lines.append(f"rank {rank} is late: for {beat.seconds:.1f} s {beat.where()}")
        return "\n".join(lines)

    def _explain(self, what: str, error: Exception) -> str:
        """Find out why a collective raised: a rank may have said so, or have stopped to write."""
        news: News = {}
        patience = 4 * self._interval
        deadline = time.monotonic() + patience + 1.0
        try:
            while time.monotonic() < deadline:
                failure = self._failure or self._board.failure
                lost = {} if failure is not None else self._lost(news, patience)
                if lost:
                    failure = self._board.fail(f"{self._obituary(lost, what)}\n({type(error).__name__}: {error})")
                if failure is not None:
                    return failure
                time.sleep(self._interval / 2)
            return self._board.fail(f"rank {self.rank} failed in {what}: {type(error).__name__}: {error}")
        except RankError as gone:
            return f"{gone}\n({type(error).__name__}: {error})"

    # The end of the program #

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Tell the other ranks why this one ends, and stay until they know: it may hold the store."""
        if os.getpid() != self._process:
            self._before(kind, error, trace)
            return
        self._board.told = True
        try:
            if not issubclass(kind, RankError):
                lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
                place = Beat(0, *self._place[:4], 0.0, "the line below").where()
                tail = "\n".join(lines[-_TAIL:])
                self._board.fail(f"rank {self.rank} failed {place}: {kind.__name__}: {error}\n{tail}")
            self._before(kind, error, trace)
            deadline = time.monotonic() + 3 * self._interval + 1.0
            while not self._board.all_know and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
        except RankError as gone:
            logger.debug("rank %d ends: %s", self.rank, gone)
