"""Weights and single values through the engine: those of the model that one process trains in plain torch types."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Transformer, micro_batch, seeded
from torch import Tensor

pytestmark = pytest.mark.rung_c

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def engine_of(rank: Rank, model: Transformer, stage: int, precision: str, **settings: Any) -> ds_core.Engine:
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2 // rank.size,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
        **settings,
    }
    return ds_core.initialize(model, config=config, group=rank.group).engine


def train(engine: ds_core.Engine, rank: Rank, steps: int) -> None:
    for step in range(steps):
        for index in range(rank.rank, 2, rank.size):
            engine.backward(engine(micro_batch(2 * step + index)))
            engine.step()


def model_of() -> Transformer:
    """A tied model with a frozen embedding and a buffer."""
    model = seeded(tied=True)
    model.positions.weight.requires_grad_(requires_grad=False)
    model.register_buffer("count", torch.arange(3))
    return model


class Written(NamedTuple):
    exact: dict[str, Tensor]  # parameters as the partitioner holds them
    held: dict[str, Tensor]  # what module_state_dict returned
    trained: dict[str, Tensor]  # likewise, without frozen parameters
    returned: list[bool]


def written(rank: Rank, stage: int, precision: str, folder: str, settings: dict[str, Any]) -> Written:
    engine = engine_of(rank, model_of(), stage, precision, **settings)
    train(engine, rank, 3)
    returned = [
        engine.save_16bit_model(folder),
        engine.save_16bit_model(folder, "trained.safetensors", exclude_frozen_parameters=True),
    ]
    exact = dict(engine.access.stream())
    return Written(exact, engine.module_state_dict(), engine.module_state_dict(True), returned)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_saved_model_has_the_bits_of_the_unsharded_one(ranks: RankPool, tmp_path: Path, precision: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    (alone,) = ranks.run(written, 0, precision, str(tmp_path / "alone"), {}, size=1)
    cast = {name: tensor.to(DTYPES[precision]) for name, tensor in alone.exact.items()}
    frozen = model_of().positions.weight.detach().to(DTYPES[precision])
    assert torch.equal(cast["positions.weight"], frozen)
    assert not torch.equal(cast["tokens.weight"], model_of().tokens.weight.detach().to(DTYPES[precision]))
    want = {**cast, "count": torch.arange(3)}
    trained = {name: tensor for name, tensor in want.items() if name != "positions.weight"}
    for stage in (0, 1, 2, 3):
        folder = tmp_path / str(stage)
        first, second = ranks.run(written, stage, precision, str(folder), {}, size=2)
        assert first.returned == second.returned == [True, True]
        assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "trained.safetensors"]
        assert_equal(safetensors.load_file(folder / "model.safetensors"), want)
        assert_equal(safetensors.load_file(folder / "trained.safetensors"), trained)
        assert second.held == second.trained == {}
        assert_equal(first.held, {**want, "head.weight": want["tokens.weight"]})
        assert_equal(first.trained, {**trained, "head.weight": want["tokens.weight"]})
        model = model_of().to(DTYPES[precision])
        model.load_state_dict(first.held)
        assert all(torch.equal(param, want[name]) for name, param in model.named_parameters())


def test_modules_kept_in_float32_are_saved_so(ranks: RankPool, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    settings = {"data_types": {"keep_in_fp32_modules": ["LayerNorm"]}}
    results = ranks.run(written, 3, "bf16", str(tmp_path), settings, size=2)
    read = safetensors.load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in read.items() if tensor.dtype == torch.float32} == {n for n in read if "norm" in n}
    assert all(torch.equal(read[name], results[0].exact[name].to(read[name].dtype)) for name in results[0].exact)


def refused(rank: Rank, folder: str) -> list[str]:
    engine = engine_of(rank, model_of(), 3, "bf16")
    texts = []
    for name in ("pytorch_model.bin", "inner/model.safetensors", "model.safetensors"):
        with pytest.raises((ValueError, RuntimeError)) as error:
            engine.save_16bit_model(folder, name)
        texts.append(str(error.value))
    engine.save_16bit_model(folder, "other.safetensors")
    return texts


def test_pickles_and_files_that_exist_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    first, second = ranks.run(refused, str(tmp_path), size=2)
    assert first[:2] == second[:2]
    assert all("give a file name that ends with .safetensors, got" in text for text in first[:2])
    assert "holds model.safetensors already" in first[2]
    assert second[2].startswith("rank 0 could not write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "other.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "mine"


# Single values #


class Values(NamedTuple):
    param: Tensor
    grad: Tensor
    moment: Tensor
    local: Tensor  # this rank's interval of the parameter
    after: Tensor  # the parameter after one more step
    copy: Tensor  # as the model sees it then


def changed(rank: Rank, stage: int, precision: str) -> Values:
    """Halve a parameter, negate its gradient and clear its momentum through the engine, then step."""
    engine = engine_of(rank, seeded(), stage, precision)
    train(engine, rank, 2)
    access, name = engine.access, "blocks.1.fc.weight"
    access.set_full_param(name, access.full_param(name) / 2)
    own = access.local_param(name)
    access.set_local_param(name, own.data + 0.25)
    local = access.local_param(name).data.clone()
    access.set_full_state(name, "exp_avg", torch.zeros_like(access.full_state(name, "exp_avg")))
    param = access.full_param(name)
    losses = [engine(micro_batch(9 + index)) for index in range(rank.rank, 2, rank.size)]
    for loss in losses:
        engine.backward(loss)
        if loss is not losses[-1]:
            engine.step()
    access.set_full_grad(name, -access.full_grad(name))
    grad = access.full_grad(name)
    assert engine.step().boundary
    with access.gathered(name):
        copy = engine.module.get_parameter(name).detach().clone()
    return Values(param, grad, access.full_state(name, "exp_avg"), local, access.full_param(name), copy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_values_are_read_and_set_through_the_engine(ranks: RankPool, precision: str) -> None:
    (want,) = ranks.run(changed, 0, precision, size=1)
    assert torch.equal(want.local, want.param.flatten())
    torch.testing.assert_close(want.moment, want.grad * (1 - 0.9))
    assert torch.equal(want.copy, want.after.to(DTYPES[precision]))
    assert not torch.equal(want.after, want.param)
    for stage in (0, 1, 2, 3):
        results = ranks.run(changed, stage, precision, size=2)
        for got in results:
            assert torch.equal(got.param, want.param)
            assert torch.equal(got.grad, want.grad)
            assert torch.equal(got.moment, want.moment)
            assert torch.equal(got.after, want.after)
            assert torch.equal(got.copy, want.copy)
        assert torch.equal(torch.cat([got.local for got in results]), want.local)
