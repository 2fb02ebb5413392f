"""Weights, gathered as payloads.

[Note: Weight differences]
Between two steps weights change little. With ``differences`` all ranks remember the weights they decoded last, and only
what has changed since is coded; what the code lacked is part of the next difference, so errors do not add up. The first
gather of a key is exact. Meant for weights that are gathered once a step (ZeRO 1 and 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .handles import After, Scratch

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from ..codec import Codec


class CodedGather:
    """All-gathers of coded shards; see [Note: Compressed collectives].

    Args:
        inner: Carries the payloads.
        codec: Of the weights, or of their differences.
        differences: See [Note: Weight differences].
    """

    def __init__(self, inner: Collectives, codec: Codec, *, differences: bool) -> None:
        self._inner = inner
        self._codec = codec
        self._differences = differences
        self._scratch = Scratch(inner)
        self._known: dict[int, Tensor] = {}  # by key: [size * n], float32, the weights that all ranks decoded last

    def sent_bytes(self, shard: Tensor, key: int) -> int:
        """Return the bytes that go to each other rank."""
        return shard.nbytes if self._is_first(key) else self._codec.payload_bytes(shard.numel())

    def start(self, out: Tensor, shard: Tensor, key: int) -> After:
        """Fill ``out`` (1D) with what every rank's ``shard`` was coded to, this rank's own slice included."""
        if self._is_first(key):

            def remember() -> None:
                self._known[key] = out.to(torch.float32, copy=True)

            return After(self._inner.all_gather(out, shard, key=key), remember)
        size, rank = self._inner.size, self._inner.rank
        known = self._known[key].view(size, -1) if self._differences else None
        num_bytes = self._codec.payload_bytes(shard.numel())
        memory = self._scratch.borrow(size * num_bytes, shard.device)
        flat = memory[: size * num_bytes]
        payloads = flat.view(size, num_bytes)
        meant = shard if known is None else shard.to(torch.float32) - known[rank]
        self._codec.encode(meant, payload=payloads[rank])

        def decode() -> None:
            for index, (payload, part) in enumerate(zip(payloads, out.view(size, -1))):
                if known is None:
                    self._codec.decode(payload, part)
                else:
                    part.copy_(self._codec.accumulate(payload, known[index]))
            self._scratch.give_back(memory)

        return After(self._inner.all_gather(flat, payloads[rank], key=key), decode)

    def _is_first(self, key: int) -> bool:
        return self._differences and key not in self._known
