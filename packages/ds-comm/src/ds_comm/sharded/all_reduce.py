"""The compressed all-reduce over a buffer whose slices belong to ranks, by the role ``Collectives``.

[Note: Sharded all-reduce]
As in [Note: Compressed all-reduce] of ``all_reduce.py``, with each rank's shard of the buffer as the slice that it
serves: server errors lie where the optimizer state of the same elements does. A reduction is cut into :meth:`send`,
:meth:`serve` and :meth:`receive`, so that those of several buffers overlap. The payloads of the last mean stay: they
are the mean to the bit, in a quarter of a byte per element, and :meth:`last` decodes them again.

With e_w of each of the N ranks' worker errors and e_s the server errors, end to end, ``sum(e_w) / N + e_s`` is *owed*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ds_core.exchange_protocols import WholeFlat
    from ds_core.protocols import Collectives, Handle

    from ..codec import Codec
    from ..traffic import Traffic

_EXCHANGES = 1 << 18  # added to the keys of exchanged payloads: their messages are no other call's


class ShardedAllReduce:
    """Mean over ranks of one flat float32 buffer, with error feedback; see [Note: Sharded all-reduce].

    Each rank sends and receives ``2 (N - 1) / N`` times the payload of the buffer in two collectives; a shard's last
    block, if shorter, has a scale, too. One rank alone sends and loses nothing. Memory: 4 bytes per element for the
    worker error, ``4 / N`` for the server error, and two payloads.

    Args:
        comm: Carries the payloads.
        codec: Codes them.
        flat: The buffer: its length, device, key and gaps. Gaps are neither sent nor owed.
        traffic: Where bytes are counted.
    """

    def __init__(self, comm: Collectives, codec: Codec, flat: WholeFlat, *, traffic: Traffic) -> None:
        self._comm, self._codec, self._traffic = comm, codec, traffic
        self._key = flat.key
        self._gaps: Sequence[tuple[int, int]] = flat.gaps
        device = flat.device
        self._per_rank = flat.numel // comm.size
        self.is_alone = comm.size == 1
        self.server_error = torch.zeros(self._per_rank, device=device)
        self._worker_error = torch.zeros(0 if self.is_alone else flat.numel, device=device)
        self._num_bytes = codec.payload_bytes(self._per_rank)
        held = 0 if self.is_alone else comm.size * self._num_bytes
        byte = torch.empty(0, dtype=torch.uint8, device=device)
        # payloads to each rank, then from the server of each slice
        self._payloads = comm.allocate(held, byte).view(comm.size, -1)
        self._received = comm.allocate(held, byte).view(comm.size, -1)
        self._handle: Handle | None = None
        self.has_last = False  # whether :meth:`last` can be called

    def send(self, x: Tensor) -> None:
        """Code ``x`` (1D, float32, with gaps) and start to send it to the servers of its slices."""
        self._quieten(x)
        slices, errors = x.view(self._comm.size, -1), self._worker_error.view(self._comm.size, -1)
        for part, error, payload in zip(slices, errors, self._payloads, strict=True):
            self._codec.encode(part, error=error, payload=payload)
        self._quieten(self._worker_error)
        self._handle = self._comm.exchange(list(self._payloads), list(self._received), key=_EXCHANGES + self._key)
        self._count()

    def serve(self, scratch: Tensor) -> None:
        """Start to send the mean of this rank's slice to all; ``scratch``: float32, as long as the buffer."""
        self._wait()
        mean = scratch[: self._per_rank].zero_()
        for payload in self._received:
            self._codec.accumulate(payload, mean, scale=1 / self._comm.size)
        own = self._payloads[self._comm.rank]
        self._codec.encode(mean, error=self.server_error, payload=own)
        self._handle = self._comm.all_gather(self._payloads.view(-1), own, key=_EXCHANGES + self._key)
        self._count()

    def receive(self, out: Tensor) -> None:
        """Write the mean into ``out`` (1D, float32)."""
        self._wait()
        self.has_last = True
        self.last(out)

    def last(self, out: Tensor) -> None:
        """Write the last mean into ``out`` (1D, float32) again."""
        for payload, part in zip(self._payloads, out.view(self._comm.size, -1), strict=True):
            self._codec.decode(payload, part)
        self._quieten(out)

    def owed(self) -> Tensor:
        """Return this rank's slice of what is owed, 1D; new memory. All ranks call it."""
        if self.is_alone:
            return self.server_error.clone()
        owed = torch.empty_like(self.server_error)
        self._comm.reduce_scatter(owed, self._worker_error, key=self._key).wait()
        return owed.div_(self._comm.size).add_(self.server_error)

    def load_owed(self, owed: Tensor | None) -> None:
        """Owe this and nothing else; None: nothing."""
        self._worker_error.zero_()
        self.server_error.zero_()
        if owed is not None:
            self.server_error.copy_(owed)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self._worker_error, self.server_error, self._payloads, self._received))

    def _quieten(self, x: Tensor) -> None:
        """Clear the gaps, which a code without a zero fills."""
        if x.numel():
            for start, end in self._gaps:
                x[start:end] = 0

    def _wait(self) -> None:
        if self._handle is None:
            raise RuntimeError("nothing is under way: call send(), serve() and receive() in this order")
        self._handle.wait()
        self._handle = None

    def _count(self) -> None:
        others = (self._comm.size - 1) * self._num_bytes
        self._traffic.count(sent=others, received=others)
