"""How all ranks of a pipeline learn why one of them cannot go on.

[Note: One fails, all end]
A rank that fails writes why into the store of the process group; the first text counts. Then it closes its
connections. So whoever waits for it, or sends to it, fails too, at once: finds the text, and closes its own. No rank
polls while all goes well. A rank that was killed writes nothing: whoever it leaves waiting names it.

The rank that holds the store may be the first to fail. So every rank stays, up to a grace time, until all have seen the
text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

_FAILURE, _SEEN = "failure", "seen"
_GRACE = 10.0  # seconds, for ranks that compute meanwhile
_POLL = 0.01  # seconds


class PipelineError(RuntimeError):
    """A rank cannot go on; says at which instruction, what it waits for, and which rank is the cause."""


class Alarm:
    """What the ranks of one pipeline tell each other beside their messages; see [Note: One fails, all end].

    Every rank makes its alarms in the same order.

    Args:
        group: The ranks.
        timeout: How long a rank waits for others.
        hang_up: Closes the connections of this rank.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta, hang_up: Callable[[], None]) -> None:
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._timeout = timeout
        self._hang_up = hang_up
        # a connection of its own: a wait of somebody else's on the group's would block it
        store = group.get_group_store().clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        number = store.add(f"ds-pipe/{self._rank}", 1)
        self._store = PrefixStore(f"ds-pipe/{number}", store)

    def offer(self, text: str) -> None:
        """Write, on rank 0, what all ranks have to agree on."""
        if self._rank == 0:
            self._store.set("agreed", text)

    def compare(self, text: str) -> None:
        """Return if rank 0 has offered ``text``.

        Raises:
            ValueError: It has offered another one, or none within the timeout.
        """
        try:
            self._store.wait(["agreed"], self._timeout)
        except RuntimeError as error:
            seconds = self._timeout.total_seconds()
            raise ValueError(f"rank 0 has made no pipeline within {seconds:g} s: {error}") from error
        offered = self._store.get("agreed").decode()
        if offered != text:
            raise ValueError(f"rank 0 runs another schedule or model, {offered}; this rank runs {text}")

    def raise_all(self, text: str, lost: Sequence[int] = ()) -> str:
        """End all ranks.

        Args:
            text: Why.
            lost: Ranks that do not answer.

        Returns:
            Why all end: the text of the rank that was first.
        """
        try:
            first = self._store.compare_set(_FAILURE, "", json.dumps([text, *lost]))
            text, *lost = json.loads(first)
        except RuntimeError as error:
            text += f"\nrank 0 is lost, or the launcher: the store of the process group does not answer ({error})"
            self._hang_up()
            return text
        self._hang_up()
        self._stay(self._size - len(lost))
        return text

    def _stay(self, num_ranks: int) -> None:
        """Return when so many ranks have seen the failure, or the grace time is over."""
        until = time.monotonic() + min(_GRACE, self._timeout.total_seconds())
        amount = 1
        try:
            while self._store.add(_SEEN, amount) < num_ranks and time.monotonic() < until:
                amount = 0
                time.sleep(_POLL)
        except RuntimeError:
            return  # the rank with the store has ended: it has seen that all know, or waited long enough
