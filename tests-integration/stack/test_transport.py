"""Partitioned models over the shared-memory backend train to the bits that they train to over gloo."""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec

import ds_zero
import pytest
import torch
import torch.distributed as dist
from ds_testkit import Rank, RankPool
from ds_testkit.models import Block, micro_batch, seeded
from ds_testkit.state import Exported, assembled, assert_same_bits, exported

pytestmark = [
    pytest.mark.rung_c,
    pytest.mark.skipif(find_spec("ds_comm._shm") is None, reason="needs the native module"),
]


def train(rank: Rank, backend: str, stage: int, host_memory: bool) -> list[Exported]:
    import ds_comm

    ds_comm.register_backends()
    group = dist.new_group(timeout=timedelta(seconds=60), backend=backend)
    config = ds_zero.ZeroConfig(stage=stage, unit_classes=(Block.__name__,), host_memory=host_memory)
    sharded = ds_zero.shard(seeded(), lambda groups: torch.optim.AdamW(groups, lr=0.01), config=config, group=group)
    for step in range(3):
        sharded.module(micro_batch(step * rank.size + rank.rank)).backward()
        sharded.step()
    state = exported(sharded)
    del sharded
    dist.destroy_process_group(group)
    return state


@pytest.mark.parametrize(("stage", "host_memory"), [(3, True), (3, False), (1, False)])
def test_bits_do_not_depend_on_the_backend(ranks: RankPool, stage: int, host_memory: bool) -> None:
    ours, gloos = (ranks.run(train, backend, stage, host_memory) for backend in ("ds_shm", "gloo"))
    assert_same_bits(assembled(ours), assembled(gloos))
