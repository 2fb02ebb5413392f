"""Models that are built without their memory train with the bits of those built in memory, also through the engine."""

from __future__ import annotations

from typing import Any

import ds_core
import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Transformer, micro_batch, seeded
from ds_testkit.state import Exported, assembled, assert_same_bits, exported

pytestmark = pytest.mark.rung_c

CONFIG: dict[str, Any] = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
}


def train(rank: Rank, how: str) -> list[Exported]:
    if how == "deferred":
        with ds_zero.deferred():
            model = seeded(tied=True)
    elif how == "meta":
        with torch.device("meta"):
            model = Transformer(tied=True)
        torch.manual_seed(7)
    else:
        model = seeded(tied=True)
        if how == "reset":  # what a model on the meta device is initialised by
            torch.manual_seed(7)
            for module in model.modules():
                if callable(getattr(module, "reset_parameters", None)):
                    module.reset_parameters()
    engine, *_ = ds_core.initialize(model, config=CONFIG, group=rank.group)
    for index in range(rank.rank, 2, rank.size):
        engine.backward(engine(micro_batch(index)))
        engine.step()
    return exported(engine._sharded)


@pytest.mark.parametrize(("how", "like"), [("deferred", "eager"), ("meta", "reset")])
def test_trains_as_the_model_in_memory(ranks: RankPool, how: str, like: str) -> None:
    want = assembled(ranks.run(train, like, size=1))
    for size in (1, 2):
        assert_same_bits(assembled(ranks.run(train, how, size=size)), want)
