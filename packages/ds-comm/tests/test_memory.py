"""What the optimizers hold, beside parameters and gradients, is what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from ds_comm.codecs import BlockCodec, E8Codec
from ds_comm.optim import CompressedAdam, Link, LocalSteps, OneBitAdam, OneBitLamb, ZeroOneAdam
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

NUMEL = 1 << 22  # four chunks
MEMORY = {"OneBitAdam": 20, "OneBitLamb": 24, "ZeroOneAdam": 28, "CompressedAdam": 16, "LocalSteps": 16}


def held_by(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors that can be reached through attributes and containers."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from held_by(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from held_by(value, seen)
    elif type(thing).__module__.startswith("ds_comm") and hasattr(thing, "__dict__"):
        yield from held_by(vars(thing), seen)


def held(rank: Rank, name: str) -> int:
    """Bytes held after steps of all kinds."""
    param, link = nn.Parameter(torch.zeros(NUMEL)), Link(group=rank.group)
    optimizer: torch.optim.Optimizer = {
        "OneBitAdam": lambda: OneBitAdam([param], freeze_step=1, link=link),
        "OneBitLamb": lambda: OneBitLamb([param], freeze_step=1, link=link),
        "ZeroOneAdam": lambda: ZeroOneAdam([param], var_freeze_step=1, link=link),
        "CompressedAdam": lambda: CompressedAdam([param], link=link),
        "LocalSteps": lambda: LocalSteps(torch.optim.SGD([param]), every=2, link=link),
    }[name]()
    for step in range(4):
        param.grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in held_by(optimizer, set())}
    for mine in (param, param.grad):
        storages.pop(mine.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.rung_c
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", MEMORY)
def test_bytes_held_are_those_of_the_documentation(ranks: RankPool, name: str, size: int) -> None:
    int4 = BlockCodec(code="int4", block=64, scale_dtype=torch.float16)
    codec = int4 if name in {"CompressedAdam", "LocalSteps"} else E8Codec()
    payloads = 3 * codec.payload_bytes(NUMEL) * (size > 1)
    chunk = 4 * (1 << 20) / size
    for found in ranks.run(held, name, size=size):
        assert (MEMORY[name] + 4 / size) * NUMEL + payloads + chunk == pytest.approx(found, rel=1e-3)
