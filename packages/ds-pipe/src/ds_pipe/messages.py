"""Values from rank to rank, asynchronously, whatever their shapes.

[Note: Agreed shapes]
A receive is posted before its message comes, so its size has to be known. Sender and receiver of a *channel* (what
enters a stage, or the gradient of what leaves it) agree on the signature of the step before: that of its last
micro-batch, whatever the order in which they were sent and taken. A message is a prefix and a payload of that size. A
value of another signature, as in the first step, follows in a second message: the first then says so in its prefix, and
how long the second is. So shapes may change at any time, at the price of one more message until the step is over;
steady shapes cost one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .instruction import Value
from .packets import Layout, Signature, signature_of

_PREFIX = 64  # bytes: three int64, the length of the signature (0: the agreed one) and of the payload that follow,
# and when it was sent, in nanoseconds of the sender's clock
_HEAD = 24
_AT_ONCE = 1e-4  # seconds; who waits less for a message has found it there
_KINDS = {"x": 0, "g": 1, "s": 2, "t": 3}
_NEVER = 2**31 - 1  # a tag with which nothing is sent


class MessageError(RuntimeError):
    """A message did not come, or did not leave.

    Attributes:
        peer: The rank at its other end.
    """

    def __init__(self, text: str, peer: int) -> None:
        self.peer = peer
        super().__init__(text)


class Trip(NamedTuple):
    """A message that its receiver has waited for."""

    peer: int  # its sender
    seconds: float  # from sending to its end, plus how far the receiver's clock is ahead of the sender's


class Traffic(NamedTuple):
    """The messages of one step, on one rank."""

    nbytes: dict[str, int]  # by what it is: "x1", of a skip "name:"; payloads
    trips: list[Trip]


class _Channel(NamedTuple):
    kind: str
    stage: int
    peer: int
    skip: str


class _Leaving(NamedTuple):
    work: dist.Work | None
    buffer: Tensor  # its memory is read until it has left
    name: Value
    dst: int


class Arrival(NamedTuple):
    """A message under way."""

    name: Value
    channel: _Channel
    layout: Layout
    buffer: Tensor
    work: dist.Work | None
    messages: Messages

    def value(self) -> Any:
        """Return it once it is there; raises as :meth:`Messages.take` does."""
        return self.messages.take(self)


class Messages:
    """Sends and receives of one rank of a pipeline; see [Note: Agreed shapes].

    Memory: of each message a buffer, until it has left, or as long as its value lives.

    Args:
        group: The ranks of the pipeline; a backend whose messages carry tags (gloo, MPI).
        num_micro_batches: In one step.
        timeout: How long a message may take.
        skips: Names of what goes past stages, on all ranks the same.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_micro_batches: int, timeout: timedelta, skips: Sequence[str] = ()
    ) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._num_micro_batches = num_micro_batches
        self._timeout = timeout
        self._skips = {name: index for index, name in enumerate(skips)}
        self._nothing = Layout(signature_of(())[0])  # agreed on where nothing has been sent
        self._agreed: dict[_Channel, Layout] = {}
        self._last: dict[_Channel, tuple[int, Layout]] = {}  # of this step: micro-batch, and how it came
        self._leaving: list[_Leaving] = []
        self._trips: list[Trip] = []
        self.waited = 0.0
        """Seconds of waiting for messages so far."""

    def send(self, name: Value, value: Any, dst: int) -> None:
        """Begin to send ``value``, a copy of it, to rank ``dst`` of the group."""
        channel = _Channel(name.kind, name.stage, dst, name.name)
        signature, tensors = signature_of(value)
        layout = agreed = self._agreed.get(channel, self._nothing)
        first = torch.empty(_PREFIX + agreed.nbytes, dtype=torch.uint8)
        prefix = first[:_HEAD].view(torch.int64)
        if signature == agreed.signature:
            agreed.write(tensors, first[_PREFIX:])
            prefix.copy_(torch.tensor((0, 0, time.monotonic_ns())))
            self._push(first, name, dst, 0)
        else:
            text, layout = signature.dump(), Layout(signature)
            prefix.copy_(torch.tensor((len(text), layout.nbytes, 0)))
            self._push(first, name, dst, 0)
            head = -(-len(text) // _PREFIX) * _PREFIX
            second = torch.empty(head + layout.nbytes, dtype=torch.uint8)
            second[: len(text)].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            layout.write(tensors, second[head:])
            self._push(second, name, dst, 1)
        self._note(channel, name, layout)

    def receive(self, name: Value, src: int) -> Arrival:
        """Begin to receive the value ``name`` from rank ``src`` of the group."""
        channel = _Channel(name.kind, name.stage, src, name.name)
        agreed = self._agreed.get(channel, self._nothing)
        buffer = torch.empty(_PREFIX + agreed.nbytes, dtype=torch.uint8)
        return Arrival(name, channel, agreed, buffer, self._post(buffer, name, src, 0), self)

    def take(self, arrival: Arrival) -> Any:
        """Return the value, once it is there.

        Raises:
            MessageError: It did not come in time, or its sender has ended.
        """
        name, channel, layout, first, work, _ = arrival
        before = self.waited
        self._wait(work, name, channel.peer, self._rank, channel.peer)
        text_bytes, nbytes, sent = first[:_HEAD].view(torch.int64).tolist()
        if not text_bytes:
            if self.waited - before > _AT_ONCE:
                self._trips.append(Trip(channel.peer, 1e-9 * (time.monotonic_ns() - sent)))
            self._note(channel, name, layout)
            return layout.read(first[_PREFIX:])
        head = -(-text_bytes // _PREFIX) * _PREFIX
        second = torch.empty(head + nbytes, dtype=torch.uint8)
        self._wait(self._post(second, name, channel.peer, 1), name, channel.peer, self._rank, channel.peer)
        layout = Layout(Signature.load(bytes(second[:text_bytes].tolist())))
        self._note(channel, name, layout)
        return layout.read(second[head:])

    def finish(self) -> Traffic:
        """Return what came and went when all that was sent has left; agree on signatures for the next step.

        Raises:
            MessageError: A message was not taken in time, or its receiver has ended.
        """
        for work, _, name, dst in self._leaving:
            self._wait(work, name, self._rank, dst, dst)
        self._leaving.clear()
        self._agreed.update((channel, layout) for channel, (_, layout) in self._last.items())
        nbytes = {
            f"x{channel.stage}" if channel.kind == "x" else f"{channel.skip}:": layout.nbytes
            for channel, (_, layout) in self._last.items()
            if channel.kind in "xs"
        }
        trips, self._trips = self._trips, []
        self._last.clear()
        return Traffic(nbytes, trips)

    def hang_up(self) -> None:
        """Close the connections of the group, so that no rank waits for this one in vain; gloo's only.

        A wait that runs out of time makes gloo close all of them, on this rank; the others' waits then raise.
        """
        if dist.get_backend(self._group) == dist.Backend.GLOO:
            for peer in range(dist.get_world_size(self._group)):
                if peer != self._rank:
                    _close(self._group, peer)

    def describe(self, name: Value, src: int, dst: int) -> str:
        """Say which message it is."""
        return f"message {name} (rank {src} -> {dst}, tag {self._tag(name)})"

    def _push(self, buffer: Tensor, name: Value, dst: int, part: int) -> None:
        try:
            work = dist.isend(buffer, group=self._group, group_dst=dst, tag=self._tag(name) + part)
        except RuntimeError as error:
            raise MessageError(f"{self.describe(name, self._rank, dst)} cannot be sent: {error}", dst) from error
        self._leaving.append(_Leaving(work, buffer, name, dst))

    def _post(self, buffer: Tensor, name: Value, src: int, part: int) -> dist.Work | None:
        try:
            return dist.irecv(buffer, group=self._group, group_src=src, tag=self._tag(name) + part)
        except RuntimeError as error:
            raise MessageError(f"{self.describe(name, src, self._rank)} cannot come: {error}", src) from error

    def _wait(self, work: dist.Work | None, name: Value, src: int, dst: int, peer: int) -> None:
        if work is None:
            return
        start = time.monotonic()
        try:
            work.wait(self._timeout)
            self.waited += time.monotonic() - start
        except RuntimeError as error:
            seconds = time.monotonic() - start
            early = seconds < self._timeout.total_seconds()
            ended = f"; rank {peer} has ended, or closed its connections" if early else ""
            text = f"waiting for {self.describe(name, src, dst)}, for {seconds:.1f} s{ended} ({error})"
            raise MessageError(text, peer) from error

    def _note(self, channel: _Channel, name: Value, layout: Layout) -> None:
        last = self._last.get(channel)
        if last is None or last[0] < name.micro_batch:
            self._last[channel] = (name.micro_batch, layout)

    def _tag(self, name: Value) -> int:
        which = self._skips[name.name] if name.name else name.stage  # a number of its own among those of its kind
        return 2 * ((4 * which + _KINDS[name.kind]) * self._num_micro_batches + max(0, name.micro_batch))


def _close(group: dist.ProcessGroup, peer: int) -> None:
    try:
        work = dist.irecv(torch.empty(1), group=group, group_src=peer, tag=_NEVER)
        if work is not None:
            work.wait(timedelta(milliseconds=1))
    except RuntimeError:
        return  # as it has to be; or it was closed before
