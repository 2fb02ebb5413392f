"""Settings that change how the model's modules run, from the configuration down."""

from __future__ import annotations

from typing import Any

import ds_core
import pytest
import torch
from ds_testkit.models import micro_batch, seeded


def engine_of(**settings: Any) -> ds_core.Engine:
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, **settings}
    return ds_core.initialize(seeded(), config=config).engine


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
