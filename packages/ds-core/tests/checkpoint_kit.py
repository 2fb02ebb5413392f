"""What the checkpoint tests share: small states, ways to deal them to ranks, and ranks as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ds_core._control import raise_errors
from ds_core.checkpoint import SaveConfig, save
from torch import Tensor

TINY = SaveConfig(part_bytes=96, piece_bytes=16)


class Held(NamedTuple):
    """A piece of a tensor (protocols.Piece)."""

    name: str
    role: str
    shape: torch.Size
    start: int
    data: Tensor


class State(NamedTuple):
    """What a rank has to save (protocols.PartState)."""

    pieces: Sequence[Held]
    shapes: Mapping[str, torch.Size]
    scalars: Mapping[str, Any]


def whole(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any] | None = None) -> State:
    """One rank that holds all; keys are ``role/name``."""
    return deal(tensors, 1, [], scalars)[0]


def deal(
    tensors: Mapping[str, Tensor],
    num_ranks: int,
    cuts: Sequence[int],
    scalars: Mapping[str, Any] | None = None,
) -> list[State]:
    """Cut every tensor at those ``cuts`` that lie in it, and deal the pieces out like cards."""
    pieces: list[list[Held]] = [[] for _ in range(num_ranks)]
    num_dealt = 0
    for key, tensor in tensors.items():
        role, _, name = key.partition("/")
        bounds = [0, *sorted(cut for cut in cuts if cut <= tensor.numel()), tensor.numel()]
        for start, end in pairwise(bounds):
            data = tensor.reshape(-1)[start:end]
            pieces[num_dealt % num_ranks].append(Held(name, role, tensor.shape, start, data))
            num_dealt += 1
    shapes = {
        key.partition("/")[2]: tensor.shape for key, tensor in tensors.items() if key.startswith(("param/", "buffer/"))
    }
    return [State(own, shapes, scalars or {}) for own in pieces]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether type, shape and every byte agree; NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


class Meeting:
    """Where ranks that are threads exchange objects; once one has left, nobody can meet any more."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._objects: list[Any] = []
        self._seen: list[Any] = []
        self._num_met = 0
        self._left = False

    def exchange(self, rank: int, obj: Any) -> list[Any]:
        with self._changed:
            turn = self._num_met
            self._objects.append((rank, obj))
            if len(self._objects) == self.size:
                self._seen = [obj for _, obj in sorted(self._objects, key=lambda pair: pair[0])]
                self._objects = []
                self._num_met += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_met > turn or self._left, timeout=60)
            if self._num_met == turn:
                raise RuntimeError("another rank has left")
            return self._seen

    def leave(self) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()


class ThreadControl:
    """Control of ranks that are threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def gather(self, obj: Any) -> list[Any] | None:
        seen = self._meeting.exchange(self.rank, obj)
        return seen if self.rank == 0 else None

    def broadcast(self, obj: Any) -> Any:
        return self._meeting.exchange(self.rank, obj)[0]

    def all_ok(self, error: str | None) -> None:
        raise_errors(self._meeting.exchange(self.rank, error))


def run_ranks(num_ranks: int, body: Callable[[ThreadControl], Any]) -> list[Any]:
    """Run ``body`` as every rank; return results or exceptions in rank order."""
    meeting = Meeting(num_ranks)

    def run(rank: int) -> Any:
        try:
            return body(ThreadControl(rank, meeting))
        except Exception as error:  # noqa: BLE001 - handed to the test, which looks at it
            return error
        finally:
            meeting.leave()

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


def save_ranks(directory: Path, tag: str, states: Sequence[State], **options: Any) -> list[Any]:
    """Save from as many threads as there are states; return what each rank returned or raised."""
    options = {"run": {}, "config": TINY, **options}
    return run_ranks(
        len(states),
        lambda control: save(directory, tag, state=states[control.rank], control=control, **options),
    )


def save_one(directory: Path, tag: str, tensors: Mapping[str, Tensor], **options: Any) -> Path:
    """Save from one rank; raise what it raised."""
    (result,) = save_ranks(directory, tag, [whole(tensors)], **options)
    if isinstance(result, Exception):
        raise result
    return result
