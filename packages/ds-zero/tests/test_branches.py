"""Ranks that use different parts of a model in the same step."""

from __future__ import annotations

import random
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.state import assembled, assert_same_bits, exported
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

NUM_BLOCKS, NUM_STEPS, NUM_MICRO_BATCHES = 7, 6, 4


class Branching(nn.Module):
    """Runs the blocks it is told to, in that order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(NUM_BLOCKS)])

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for index in order:
            x = self.blocks[index](x)
        return x.square().mean()


def order_of(micro_batch: int) -> list[int]:
    """Which blocks a micro-batch runs: some of them, shuffled; all of them in the very first step of some."""
    source = random.Random(micro_batch)
    return source.sample(range(NUM_BLOCKS), source.randint(1, NUM_BLOCKS))


def train(rank: Rank, stage: int, settings: dict[str, Any]) -> list[Any]:
    model = Branching()
    config = ds_zero.ZeroConfig(stage=stage, **settings)
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    for step in range(NUM_STEPS):
        for index in range(rank.rank, NUM_MICRO_BATCHES, rank.size):
            micro_batch = step * NUM_MICRO_BATCHES + index
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(micro_batch))
            model(x, order_of(micro_batch)).backward()
        sharded.step()
    return exported(sharded)


@pytest.mark.parametrize(
    "settings",
    [{}, {"host_memory": False}, {"mics_shard_size": 2}, {"mics_shard_size": 2, "host_memory": False}],
    ids=["host memory", "messages", "nodes", "nodes, messages"],
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_rank_its_own_branch(ranks: RankPool, stage: int, settings: dict[str, Any]) -> None:
    want = assembled(ranks.run(train, 0, {}, size=1))
    assert_same_bits(assembled(ranks.run(train, stage, settings, size=4)), want)
