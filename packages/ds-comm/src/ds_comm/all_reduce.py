"""The mean over ranks of one flat buffer, in compressed payloads or exactly.

[Note: Compressed all-reduce]
Each rank is the server of one slice. It codes every slice of its own values plus its *worker error*, and sends each to
its server (all-to-all). The server adds the payloads in float32, in order of ranks, codes the mean plus its *server
error*, and all ranks decode the same payloads (all-gather): the result has the same bits on every rank.

What a payload lacks stays in an error and is sent along next time. With e_w of each of the N ranks' worker errors and
e_s the server errors, end to end, the *residual* is ``sum(e_w) / N + e_s``, and for every call, to float32 rounding,

    result = mean of the values + residual before - residual after.

Nothing else matters for what is sent over time, so a checkpoint holds the residual alone, whatever the number of ranks;
after loading, it lies in the server errors.

The last byte of a rank's first message to each server says whether its values are finite. If some rank's are not, no
rank sends a second time, and every rank puts its error back, to rounding: a bad step leaves nothing behind.

A long buffer goes in chunks, each with a slice for every server: while one is under way the next is coded, so that a
call takes the longer of coding and sending instead of both. Codes are by block, and a chunk ends where a block does:
the result has the same bits whatever the chunks. Slices of a chunk are long enough that its messages are codes, not
padding, on any number of ranks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .codec import check_codec
from .messages import exchanges
from .traffic import Traffic

if TYPE_CHECKING:
    from .codec import Codec

_ALIGNMENT = 16  # bytes: messages to different ranks begin at multiples of it
_CHUNK = 1 << 20  # elements: two milliseconds' coding, and at 100 Mbit/s a few milliseconds' bytes
_SLICE = 1 << 14  # elements of a chunk for each rank, at least


class _Chunk(NamedTuple):
    """A part of the buffer whose messages go together."""

    slices: list[slice]  # of the buffer, by rank that serves them
    own: slice  # of the server's memory: what this rank serves
    sent: Tensor  # messages, [ranks, bytes]: to the servers
    received: Tensor  # from all ranks
    means: Tensor  # from the servers


class CompressedAllReduce:
    """Mean over ranks of one flat float32 buffer, with error feedback; see [Note: Compressed all-reduce].

    Each rank sends and receives ``2 (N - 1) / N`` times the payload of the whole buffer, in two exchanges for each
    chunk; slices are whole blocks, messages multiples of 16 bytes. With the E8 code that is at most 0.27 bytes per
    element on any number of ranks, from 65536 elements for each of them on. A group of one rank sends and loses
    nothing. Memory: 4 bytes per element for the worker error, ``4 / N`` for the server error, three payloads, and
    ``4 / N`` bytes per element of a chunk.

    Args:
        numel: Elements of the buffer, the same on all ranks.
        codec: Codes the messages.
        group: The ranks: gloo, MPI or NCCL. None: all ranks, or this process alone where there is no process group.
        device: Where the buffers lie: one that the group's backend serves.
        traffic: Where bytes are counted; None: a counter of its own.
        chunk: About how many elements are coded and sent together; None: a million, and 16384 at least for each rank.

    Raises:
        ValueError: ``numel`` is negative, ``chunk`` is not positive, or ``codec`` a name.

    Example:
        >>> from .codecs import BlockCodec
        >>> reducer = CompressedAllReduce(3, BlockCodec(code="int8", block=64))
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> reducer.reduce(x)  # alone: the mean is x itself
        True
        >>> x
        tensor([1., 2., 3.])

    Reference:
        Tang et al., 1-bit Adam, 2021, https://arxiv.org/abs/2102.02888 (both errors, all-to-all and all-gather).
    """

    def __init__(
        self,
        numel: int,
        codec: Codec,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        traffic: Traffic | None = None,
        chunk: int | None = None,
    ) -> None:
        if numel < 0:
            raise ValueError(f"numel must not be negative; got {numel}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least one element; got {chunk}")
        check_codec("codec", codec)
        self._group, self._codec = group, codec
        self.rank, self.size = place_in(group)
        self.traffic = Traffic() if traffic is None else traffic
        self.worker_error = torch.zeros(numel, device=device)
        self._chunks: list[_Chunk] = []
        unit, served = self.size * codec.block, 0
        length = -(-(chunk or max(_CHUNK, self.size * _SLICE)) // unit) * unit
        for start in range(0, max(numel, 1), length):
            self._chunks.append(self._lay_out(start, min(length, numel - start), served))
            served = self._chunks[-1].own.stop
        self.server_error = torch.zeros(served, device=device)
        self._mean = torch.empty(max(part.own.stop - part.own.start for part in self._chunks), device=device)

    def _lay_out(self, start: int, numel: int, served: int) -> _Chunk:
        per_rank = -(-numel // (self.size * self._codec.block)) * self._codec.block
        ends = [start + min(rank * per_rank, numel) for rank in range(self.size + 1)]
        slices = [slice(*pair) for pair in pairwise(ends)]
        own = slice(served, served + slices[self.rank].stop - slices[self.rank].start)
        payload = self._codec.payload_bytes(per_rank) + (start == 0)  # the flag
        message = -(-payload // _ALIGNMENT) * _ALIGNMENT if self.size > 1 else 0
        messages = torch.zeros(3, self.size, message, dtype=torch.uint8, device=self.worker_error.device)
        return _Chunk(slices, own, *messages)

    def reduce(self, x: Tensor, out: Tensor | None = None) -> bool:
        """Write the mean of all ranks' ``x`` into ``out``. All ranks call it.

        Args:
            x: ``[numel]``, float32, contiguous. Not changed, unless it is ``out``.
            out: Like ``x``; None: ``x`` itself.

        Returns:
            Whether all ranks' values were finite, the same on all ranks. If not, ``out`` is as before, and so are the
            errors, to rounding.

        Raises:
            ValueError: ``x`` or ``out`` has another shape, data type or layout.
        """
        out = x if out is None else out
        self._check(x)
        self._check(out)
        finite = is_finite(x)
        if self.size == 1:
            return self._alone(x, out) if finite else False
        expect = exchanges(self._group, x.device.type)
        first = [expect(chunk.received) for chunk in self._chunks]
        self._chunks[0].sent[:, -1] = int(finite)
        for chunk, exchange in zip(self._chunks, first, strict=True):
            self._encode(chunk, x, finite=finite)
            exchange.send(chunk.sent)
            self._count(chunk)
        first[0].wait()
        if not bool(self._chunks[0].received[:, -1].all()):
            for exchange in first[1:]:
                exchange.wait()
            if finite:
                self._take_back(x)
            return False
        second = [expect(chunk.means) for chunk in self._chunks]
        for index, (chunk, exchange) in enumerate(zip(self._chunks, second, strict=True)):
            if index:
                first[index].wait()
            self._serve(chunk)
            exchange.spread(chunk.sent[0])
            self._count(chunk)
        for chunk, exchange in zip(self._chunks, second, strict=True):
            exchange.wait()
            for part, message in zip(chunk.slices, chunk.means, strict=True):
                self._codec.decode(self._payload(message, part), out[part])
        return True

    def residual(self) -> Tensor:
        """Return what is still to be sent, ``[numel]``, the same on all ranks; new memory. All ranks call it."""
        total = self.worker_error / self.size
        for chunk in self._chunks:
            total[chunk.slices[self.rank]] += self.server_error[chunk.own]
        if self.size > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def load_residual(self, residual: Tensor) -> None:
        """Take over :meth:`residual` of a group of any number of ranks.

        Args:
            residual: ``[numel]``, the same on all ranks.

        Raises:
            ValueError: It has another shape.
        """
        if residual.shape != self.worker_error.shape:
            raise ValueError(
                f"the residual must have the shape {tuple(self.worker_error.shape)}; got {tuple(residual.shape)}: it "
                "belongs to a buffer of another length"
            )
        self.worker_error.zero_()
        for chunk in self._chunks:
            self.server_error[chunk.own] = residual[chunk.slices[self.rank]]

    def forget(self) -> None:
        """Set the errors to zero: what was not sent is lost."""
        self.worker_error.zero_()
        self.server_error.zero_()

    def _alone(self, x: Tensor, out: Tensor) -> bool:
        torch.add(x, self.worker_error.add_(self.server_error), out=out)
        self.forget()
        return True

    def _encode(self, chunk: _Chunk, x: Tensor, *, finite: bool) -> None:
        if finite:
            for part, message in zip(chunk.slices, chunk.sent, strict=True):
                self._codec.encode(x[part], error=self.worker_error[part], payload=self._payload(message, part))

    def _take_back(self, x: Tensor) -> None:
        for chunk in self._chunks:
            for part, message in zip(chunk.slices, chunk.sent, strict=True):
                self._codec.accumulate(self._payload(message, part), self.worker_error[part])
        self.worker_error.sub_(x)

    def _serve(self, chunk: _Chunk) -> None:
        """Code the mean of what has arrived, to row 0 of ``sent``."""
        own = chunk.slices[self.rank]
        mean = self._mean[: own.stop - own.start].zero_()
        for message in chunk.received:
            self._codec.accumulate(self._payload(message, own), mean, scale=1 / self.size)
        self._codec.encode(mean, error=self.server_error[chunk.own], payload=self._payload(chunk.sent[0], own))

    def _count(self, chunk: _Chunk) -> None:
        others = (self.size - 1) * chunk.sent.shape[1]
        self.traffic.count(sent=others, received=others)

    def _payload(self, message: Tensor, part: slice) -> Tensor:
        return message[: self._codec.payload_bytes(part.stop - part.start)]

    def _check(self, x: Tensor) -> None:
        if x.shape != self.worker_error.shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"the buffer must be contiguous, torch.float32, of shape {tuple(self.worker_error.shape)}; got "
                f"{x.dtype}, shape {tuple(x.shape)}, strides {x.stride()}"
            )


def mean_exactly(
    x: Tensor, group: dist.ProcessGroup | None, *, dtype: torch.dtype = torch.float32, traffic: Traffic | None = None
) -> None:
    """Replace ``x`` by its mean over ranks, sent uncompressed. All ranks call it.

    Each rank sends and receives ``2 (N - 1) / N`` elements for each of ``x``.

    Args:
        x: Float32, contiguous.
        group: The ranks; None as in :class:`CompressedAllReduce`.
        dtype: Data type in which values are sent and added.
        traffic: Where bytes are counted.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> mean_exactly(x, None)  # alone: nothing to do
        >>> x
        tensor([1., 2.])
    """
    _, size = place_in(group)
    if size == 1:
        return
    message = x.to(dtype)
    dist.all_reduce(message, group=group)
    torch.div(message.to(x.dtype), size, out=x)
    moved = 2 * (size - 1) * x.numel() * dtype.itemsize // size
    if traffic is not None:
        traffic.count(sent=moved, received=moved)


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in ``group`` and the group's size; None as in :class:`CompressedAllReduce`."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def is_finite(x: Tensor) -> bool:
    """Return whether all elements are finite, in one pass without memory."""
    return not x.numel() or all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(x)).tolist())
