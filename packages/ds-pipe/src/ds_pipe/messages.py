"""Values from rank to rank, asynchronously, whatever their shapes.

[Note: Agreed shapes]
A receive is posted before its message comes, so its size has to be known. Sender and receiver of a *channel* (what
enters a stage, or the gradient of what leaves it) agree on the signature that came last in the step before. A message
is a prefix and a payload of that size. A value of another signature, as in the first step, follows in a second message:
the first then says so in its prefix, and how long the second is. So shapes may change at any time, at the price of one
more message until the step is over; steady shapes cost one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .instruction import Value
from .packets import NOTHING, Signature, read, signature_of, write

_PREFIX = 64  # bytes: two int64, the length of the signature (0: the agreed one) and of the payload that follow
_KINDS = {"x": 0, "g": 1}


class _Channel(NamedTuple):
    kind: str
    stage: int
    peer: int


class Arrival:
    """A message under way."""

    def __init__(self, buffer: Tensor, work: dist.Work | None, take: Callable[[Tensor], Any]) -> None:
        self._buffer = buffer
        self._work = work
        self._take = take

    def wait(self, timeout: timedelta) -> Any:
        """Return the value.

        Raises:
            RuntimeError: It did not come in time, or its sender has ended.
        """
        if self._work is not None:
            self._work.wait(timeout)
        return self._take(self._buffer)


class Messages:
    """Sends and receives of one rank of a pipeline; see [Note: Agreed shapes].

    Args:
        group: The ranks of the pipeline; a backend whose messages carry tags (gloo, MPI).
        num_micro_batches: In one step.
        timeout: How long a message may take.
    """

    def __init__(self, group: dist.ProcessGroup, num_micro_batches: int, timeout: timedelta) -> None:
        self._group = group
        self._num_micro_batches = num_micro_batches
        self._timeout = timeout
        self._agreed: dict[_Channel, Signature] = {}
        self._last: dict[_Channel, Signature] = {}  # of this step
        self._leaving: list[tuple[dist.Work | None, Tensor]] = []  # their memory is read until they have left

    def send(self, name: Value, value: Any, dst: int) -> None:
        """Begin to send ``value``, a copy of it, to rank ``dst`` of the group."""
        channel = _Channel(name.kind, name.stage, dst)
        signature, tensors = signature_of(value)
        agreed = self._agreed.get(channel, NOTHING)
        self._last[channel] = signature
        first = torch.empty(_PREFIX + agreed.nbytes, dtype=torch.uint8)
        prefix = first[:16].view(torch.int64)
        if signature == agreed:
            prefix.zero_()
            write(tensors, first[_PREFIX:])
            self._push(first, dst, self._tag(name))
            return
        text = signature.dump()
        prefix[0], prefix[1] = len(text), signature.nbytes
        self._push(first, dst, self._tag(name))
        head = -(-len(text) // _PREFIX) * _PREFIX
        second = torch.empty(head + signature.nbytes, dtype=torch.uint8)
        second[: len(text)].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        write(tensors, second[head:])
        self._push(second, dst, self._tag(name) + 1)

    def receive(self, name: Value, src: int) -> Arrival:
        """Begin to receive the value ``name`` from rank ``src`` of the group."""
        channel = _Channel(name.kind, name.stage, src)
        agreed = self._agreed.get(channel, NOTHING)
        buffer = torch.empty(_PREFIX + agreed.nbytes, dtype=torch.uint8)
        work = dist.irecv(buffer, group=self._group, group_src=src, tag=self._tag(name))

        def take(first: Tensor) -> Any:
            text_bytes, nbytes = first[:16].view(torch.int64).tolist()
            if not text_bytes:
                self._last[channel] = agreed
                return read(agreed, first[_PREFIX:])
            head = -(-text_bytes // _PREFIX) * _PREFIX
            second = torch.empty(head + nbytes, dtype=torch.uint8)
            more = dist.irecv(second, group=self._group, group_src=src, tag=self._tag(name) + 1)
            if more is not None:
                more.wait(self._timeout)
            signature = self._last[channel] = Signature.load(bytes(second[:text_bytes].tolist()))
            return read(signature, second[head:])

        return Arrival(buffer, work, take)

    def finish(self) -> None:
        """Return when all that was sent has left; what came last is agreed on for the next step."""
        for work, _ in self._leaving:
            if work is not None:
                work.wait(self._timeout)
        self._leaving.clear()
        self._agreed.update(self._last)

    def _push(self, buffer: Tensor, dst: int, tag: int) -> None:
        self._leaving.append((dist.isend(buffer, group=self._group, group_dst=dst, tag=tag), buffer))

    def _tag(self, name: Value) -> int:
        return 2 * ((2 * name.stage + _KINDS[name.kind]) * self._num_micro_batches + name.micro_batch)
