"""Settings that change how the model's modules run, from the configuration down."""

from __future__ import annotations

from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import Exported, assembled, assert_same_bits, exported


def engine_of(**settings: Any) -> ds_core.Engine:
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, **settings}
    return ds_core.initialize(seeded(), config=config).engine


class Trained(NamedTuple):
    pieces: list[Exported]
    losses: list[float]
    peak_units: int
    graphs: int  # compiled


def trained(rank: Rank, stage: int, compiled: bool, checkpointing: dict[str, Any]) -> Trained:
    """Three steps with dropout; two micro-batches a step, dealt to the ranks."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    engine = ds_core.initialize(
        seeded(dropout=0.2, layers=4),
        config={
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": stage},
            "activation_checkpointing": checkpointing,
        },
        group=rank.group,
    ).engine
    if compiled:
        engine.compile(backend="aot_eager", compile_kwargs={"fullgraph": True})
    losses = []
    for step in range(3):
        for index in range(rank.rank, 2, rank.size):
            loss = engine(micro_batch(2 * step + index))
            losses.append(engine.backward(loss).item())
            engine.step()
    sharded: Any = engine._sharded
    return Trained(exported(sharded), losses, sharded.memory().peak_units, counters["stats"]["unique_graphs"])


RECOMPUTED = [
    {"blocks": True},
    {"blocks": True, "cpu_checkpointing": True, "contiguous_memory_optimization": True, "number_checkpoints": 4},
]


@pytest.mark.rung_c
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recomputed_blocks_change_no_bit(ranks: RankPool, compiled: bool) -> None:
    (want,) = ranks.run(trained, 0, False, {}, size=1)
    for stage, size in ((0, 1), (1, 2), (2, 2), (3, 2)):
        for checkpointing in RECOMPUTED:
            got = ranks.run(trained, stage, compiled, checkpointing, size=size)
            assert_same_bits(assembled(each.pieces for each in got), assembled([want.pieces]))
            assert [got[index % size].losses[index // size] for index in range(6)] == want.losses
            assert {each.peak_units for each in got} == {2 if stage == 3 else 0}
            assert {each.graphs for each in got} == {1 if compiled else 0}


def test_modules_may_stay_in_float32() -> None:
    engine = engine_of(bf16={"enabled": True}, data_types={"keep_in_fp32_modules": ["LayerNorm"]})
    wide = {name for name, param in engine.module.named_parameters() if param.dtype == torch.float32}
    assert wide == {name for name, _ in engine.module.named_parameters() if "norm" in name}
    assert engine.module.norm(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    engine.backward(engine(micro_batch(0)))
    assert engine.step().boundary


def test_a_plain_backward_call_is_as_good_as_the_engines() -> None:
    ours, plain = engine_of(zero_optimization={"stage": 2}), engine_of(zero_optimization={"stage": 2})
    for step in range(3):
        ours.backward(ours(micro_batch(step)))
        plain(micro_batch(step)).backward()
        assert ours.step() == plain.step()
    pairs = zip(ours.module.parameters(), plain.module.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch._dynamo's own
def test_the_engine_compiles() -> None:
    plain, compiled = engine_of(), engine_of()
    assert not compiled.is_compiled
    compiled.compile(backend="aot_eager", compile_kwargs={"fullgraph": True})
    assert compiled.is_compiled
    losses = []
    for engine in (plain, compiled):
        for step in range(2):
            losses.append(engine.backward(engine(micro_batch(step))))
            engine.step()
    assert torch.equal(torch.stack(losses[:2]), torch.stack(losses[2:]))
