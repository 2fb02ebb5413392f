"""Control messages between ranks: small JSON values, and errors that end all ranks together.

Messages travel as bytes of JSON in uint8 tensors, so no rank ever unpickles what another one sent.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .protocols import Json

_MAX_SETTLING, _POLL = 1.0, 1e-4  # seconds, see _settle


class RankError(RuntimeError):
    """Raised on every rank when at least one of several reported an error; the text names ranks and errors.

    A process that works alone raises the error itself instead.
    """


class Control(Protocol):
    """Messages within one group of ranks; every method is called by all ranks, in the same order."""

    @property
    def rank(self) -> int:
        """This process's index in the group."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    def gather(self, obj: Json) -> list[Json] | None:
        """Return every rank's ``obj`` in rank order at rank 0, None elsewhere."""

    def broadcast(self, obj: Json) -> Json:
        """Return rank 0's ``obj``; the other ranks' is ignored."""

    def all_ok(self, error: str | None) -> None:
        """Return when no rank has an error; otherwise raise :class:`RankError` on all of them."""


class SingleControl:
    """Control of a process that works alone.

    Example:
        >>> SingleControl().gather({"step": 3})
        [{'step': 3}]
    """

    rank = 0
    size = 1

    def gather(self, obj: Json) -> list[Json] | None:
        """Return ``[obj]``."""
        return [obj]

    def broadcast(self, obj: Json) -> Json:
        """Return ``obj``."""
        return obj

    def all_ok(self, error: str | None) -> None:
        """Raise :class:`RankError` if there is an error."""
        raise_errors([error])


class GroupControl:
    """Control over a process group.

    Args:
        group: The ranks that take part.
        device: Where the byte tensors live: the CPU for gloo, this rank's GPU for nccl.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, obj: Json) -> list[Json] | None:
        """Return every rank's ``obj`` at rank 0, None elsewhere; rank 0 holds ``size`` times the longest."""
        message = _encode(obj)
        row = self._to_device(message.ljust(self._longest(message)))  # JSON may end with spaces
        rows = [torch.empty_like(row) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(row, rows, group=self._group, group_dst=0)
        _settle([row, *(rows or [])])
        return None if rows is None else [_decode(row) for row in rows]

    def broadcast(self, obj: Json) -> Json:
        """Return rank 0's ``obj``."""
        message = _encode(obj) if self.rank == 0 else b""
        nbytes = torch.tensor([len(message)], device=self._device)
        dist.broadcast(nbytes, group=self._group, group_src=0)
        row = self._to_device(message.ljust(int(nbytes)))
        dist.broadcast(row, group=self._group, group_src=0)
        _settle([nbytes, row])
        return _decode(row)

    def all_ok(self, error: str | None) -> None:
        """Raise :class:`RankError` on all ranks, naming those that have an error; one message if none has."""
        if not self._longest(b"" if error is None else _encode(error)):
            return
        errors = self.broadcast(self.gather(error))
        raise_errors(cast("list[str | None]", errors))

    def _longest(self, message: bytes) -> int:
        nbytes = torch.tensor([len(message)], device=self._device)
        dist.all_reduce(nbytes, dist.ReduceOp.MAX, group=self._group)
        _settle([nbytes])
        return int(nbytes)

    def _to_device(self, message: bytes) -> Tensor:
        # bytearray: torch warns about memory that it could write to but must not.
        return torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._device)


def _settle(messages: Sequence[Tensor]) -> None:
    """Wait until nobody else holds ``messages``.

    A thread of gloo's holds a message for a moment after it has arrived. If it is the last one to let go, freeing the
    message takes the interpreter's lock, and a program that ends at that moment aborts. nccl has no such thread.
    """
    messages = [message for message in messages if message.device.type == "cpu"]
    deadline = time.monotonic() + _MAX_SETTLING
    # torch's stubs lack _use_count
    while any(m._use_count() > 1 for m in messages) and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(_POLL)


def make_control(group: dist.ProcessGroup | None, device: torch.device | None = None) -> Control:
    """Return the control of ``group``, or of this process alone.

    Args:
        group: The ranks that take part; None for a single process.
        device: Where messages live; None is the CPU (gloo). An nccl group needs this rank's GPU.

    Returns:
        An object with the methods of :class:`Control`.

    Example:
        >>> make_control(None).broadcast("global_step3")
        'global_step3'
    """
    return SingleControl() if group is None else GroupControl(group, device or torch.device("cpu"))


def everybody(control: Control, own: Json) -> list[Any]:
    """Return every rank's ``own``, in their order, on all ranks.

    Example:
        >>> everybody(make_control(None), {"step": 3})
        [{'step': 3}]
    """
    return cast("list[Any]", control.broadcast(control.gather(own)))


@contextmanager
def together(control: Control, *, own_type: bool = False) -> Iterator[None]:
    """Let all ranks leave the block, or raise on all of them.

    Without it, an error on one rank would leave the others waiting in their next collective. For the same
    reason nothing inside the block may communicate.

    Args:
        control: The ranks.
        own_type: Whether a rank on which the block fails raises its own error, as the caller of one rank expects it.

    Yields:
        Nothing.

    Raises:
        RankError: The block failed on at least one of several ranks; the text names the ranks and their errors. A
            process that works alone raises the error itself.

    Example:
        >>> with together(make_control(None)):
        ...     raise OSError("disk full")
        Traceback (most recent call last):
        ...
        OSError: disk full
    """
    try:
        yield
    except Exception as error:
        if control.size == 1:
            raise
        with suppress(RankError) if own_type else nullcontext():
            control.all_ok(f"{type(error).__name__}: {error}")
        raise
    control.all_ok(None)


def raise_errors(errors: Sequence[str | None]) -> None:
    """Raise :class:`RankError` unless all are None; ranks with the same text share a line.

    Example:
        >>> raise_errors([None, "disk full", "disk full"])
        Traceback (most recent call last):
        ...
        ds_core._control.RankError: ranks 1, 2: disk full
    """
    ranks_by_error: dict[str, list[int]] = {}
    for rank, error in enumerate(errors):
        if error is not None:
            ranks_by_error.setdefault(error, []).append(rank)
    if ranks_by_error:
        raise RankError("\n".join(_blame(ranks, error) for error, ranks in ranks_by_error.items()))


def _blame(ranks: Sequence[int], error: str) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {error}"


def _encode(obj: Json) -> bytes:
    return json.dumps(obj).encode()


def _decode(row: Tensor) -> Json:
    on_host = row.cpu()
    return cast("Json", json.loads(ctypes.string_at(on_host.data_ptr(), on_host.numel())))
