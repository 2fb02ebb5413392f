"""Tensor parallelism in the stack: how it starts, what it frees, and ranks that differ."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_pipe import LayerSpec, PipelineModule
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

WIDTH = 4


@pytest.fixture(scope="module")
def ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    pool = RankPool(4, str(pytestconfig.rootpath))
    yield pool
    pool.close()


class Times(torch.autograd.Function):
    """Passes a value on, and multiplies its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class Pair(nn.Module):
    """A column and a row layer, and behind them a parameter that all tensor ranks have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.factor = 1.0  # of the gradient of ``scale``

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value).tanh()) * Times.apply(self.scale, self.factor)


SPECS = [{"patterns": [r"(.*\.)?first$"]}, {"patterns": [r"(.*\.)?second$"], "partition_type": "row"}]


def config_of(
    size: int, blocks: int = 2, specs: list[dict[str, Any]] = SPECS, stage: int = 0, *, optimizer: bool = True
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        **({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}} if optimizer else {}),
        "tensor_parallel": {"autotp_size": size, "blocks": blocks, "partition_config": {"layer_specs": specs}},
    }


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("optimizer", ["configured", "given", "listed"])
def test_no_weight_is_kept_whole(optimizer: str, stage: int) -> None:
    model = nn.Sequential(Pair(), Pair())
    whole = {name: weakref.ref(param) for name, param in model.named_parameters()}
    given = torch.optim.AdamW(model.parameters()) if optimizer == "given" else None
    listed = [{"params": [*model.parameters()], "lr": 0.5}] if optimizer == "listed" else None
    config = config_of(1, stage=stage, optimizer=given is None)
    engine, *_ = ds_core.initialize(model, given, config=config, model_parameters=listed)
    del listed
    engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
    engine.step()
    gc.collect()
    kept = {name for name, ref in whole.items() if ref() is not None}
    assert {name.split(".", 1)[1] for name in whole} - {name.split(".", 1)[1] for name in kept} == {
        "first.weight",
        "first.bias",
        "second.weight",
    }
    assert engine.module_state_dict().keys() == whole.keys()


class Stepped(NamedTuple):
    norm: float
    skipped: int


def step(rank: Rank, factors: list[float], stage: int) -> Stepped | str:
    """Step once; the gradient of what all tensor ranks have is multiplied by this rank's factor."""
    torch.manual_seed(1)
    model = Pair()
    model.factor = factors[rank.rank]
    engine, *_ = ds_core.initialize(model, config=config_of(2, stage=stage), group=rank.group)
    engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    return Stepped(engine.last_outcome.grad_norm, engine.skipped_steps)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("factor", [math.inf, math.nan, 0.5])
def test_gradients_that_one_tensor_rank_alone_has_end_all_ranks(ranks: RankPool, factor: float, stage: int) -> None:
    for factors in ([1.0, factor, 1.0, factor], [factor, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, factor]):
        found = ranks.run(step, factors, stage)
        assert len(set(found)) == 1, found
        assert "are other ones on ranks [1] than on rank 0" in found[0]


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_gradients_that_are_not_finite_on_all_ranks_are_skipped(ranks: RankPool, factor: float) -> None:
    found = ranks.run(step, [factor] * 4, 1)
    assert len(set(map(repr, found))) == 1, found
    assert not math.isfinite(found[0].norm)
    assert found[0].skipped == 1


def described() -> PipelineModule:
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(Pair), LayerSpec(Pair), LayerSpec(nn.Linear, WIDTH, WIDTH)]
    return PipelineModule(layers, loss_fn=nn.functional.mse_loss, partition_method="uniform")


def refuse(rank: Rank, num_stages: int) -> tuple[str, bool]:
    """Return what is said of patterns that match nothing, and whether the model is as it was."""
    specs = [*SPECS, {"patterns": ["3$", "head$", "arm$"]}]
    model: Any = described()
    config = config_of(2, specs=specs)
    if num_stages:
        config["pipeline"] = {"stages": num_stages}
    else:
        model = model.build(0, 4)
    before = [] if num_stages else [*model.named_modules()]
    with pytest.raises(ValueError, match="tensor_parallel") as caught:
        ds_core.initialize(model, config=config, group=rank.group)
    return str(caught.value), not num_stages and before == [*model.named_modules()]


@pytest.mark.parametrize("num_stages", [0, 1, 2])
def test_patterns_that_match_nothing_are_told_with_the_names_of_all_stages(ranks: RankPool, num_stages: int) -> None:
    want = (
        "tensor_parallel: no module of the model matches 'head$', 'arm$'; it has 0, 1.first, 1.second, 2.first, "
        "2.second, 3: patterns are matched from the start of a name"
    )
    assert ranks.run(refuse, num_stages) == [(want, num_stages == 0)] * 4


def test_a_section_without_rules() -> None:
    config = config_of(1, specs=[])
    config["tensor_parallel"]["partition_config"]["use_default_specs"] = False
    with pytest.raises(ValueError, match="no rule says what to split, and use_default_specs is false"):
        ds_core.initialize(Pair(), config=config)
