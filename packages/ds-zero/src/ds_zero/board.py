"""What ranks tell each other beside their collectives: small texts in the store of the process group."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

_FAILURE = "failure"
_SEEN = "seen"


class RankError(RuntimeError):
    """One of the ranks cannot go on, so none can; the text names the rank and says why. Raised on all of them."""


class Board:
    """Notes of the ranks of one group.

    Every rank makes its boards in the same order. All methods raise :class:`RankError` once the store is gone.

    Args:
        group: The ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # a connection of its own: a wait of somebody else's on the group's would block it
        store = group.get_group_store().clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        number = store.add(f"ds-board/{self.rank}", 1)
        self._store = PrefixStore(f"ds-board/{number}", store)
        self.told = False  # whether the program of this rank knows of a failure

    def put(self, key: str, value: Any) -> None:
        """Write a JSON value."""
        self._ask(self._store.set, key, json.dumps(value))

    def get(self, key: str) -> Any:
        """Return what was written, or None; does not wait."""
        return json.loads(self._ask(self._store.get, key)) if self._ask(self._store.check, [key]) else None

    def drop(self, key: str) -> None:
        """Forget a value."""
        self._ask(self._store.delete_key, key)

    def count(self, key: str, amount: int = 1) -> int:
        """Add to a counter that all ranks share, and return it."""
        return int(self._ask(self._store.add, key, amount))

    def fail(self, text: str) -> str:
        """Tell all ranks why none can go on; returns what they are told: the first failure counts."""
        first: str = json.loads(self._ask(self._store.compare_set, _FAILURE, "", json.dumps(text)))
        return first

    def end(self, text: str, cause: Exception | None = None) -> NoReturn:
        """Tell the program of this rank, which calls this, why it cannot go on."""
        self.told = True
        raise RankError(text) from cause

    @property
    def failure(self) -> str | None:
        """Why no rank can go on, once a rank has said so."""
        text: str | None = self.get(_FAILURE)
        return text

    def acknowledge(self) -> None:
        """Say that this rank knows of the failure."""
        self.count(_SEEN)

    @property
    def all_know(self) -> bool:
        """Whether every rank knows of the failure."""
        return self.count(_SEEN, 0) >= self.size

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        try:
            return question(*args)
        except RuntimeError as error:
            raise RankError(
                f"rank 0 is lost, or the launcher: the store of the process group, which one of them holds, does not "
                f"answer rank {self.rank} ({error})"
            ) from error
