"""Blocks compiled one by one: whole graphs, one for all of a kind, none compiled anew, and the same numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import Exported, assembled, assert_same_bits, exported
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

LAYERS = 10  # more than torch.compile would compile anew for one function


class Compiled(NamedTuple):
    pieces: list[Exported]
    graphs: list[int]  # so far, after each step
    breaks: int
    units: int


def trained(rank: Rank, stage: int, settings: dict[str, Any] | None, compute: Any = None, steps: int = 3) -> Compiled:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = seeded(layers=LAYERS)
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-3),
        config=ds_zero.ZeroConfig(stage=stage),
        group=rank.group,
        precision=ds_zero.Precision(compute=compute, keep_fp32=("LayerNorm",)),
    )
    if settings is not None:
        sharded.compile(**settings)
    graphs = []
    for step in range(steps):
        for index in range(rank.rank, 2, rank.size):
            model(micro_batch(2 * step + index)).backward()
        sharded.step()
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    return Compiled(exported(sharded), graphs, breaks, sharded.memory().peak_units)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_same_bits_one_graph_and_no_break(ranks: RankPool, stage: int, compute: Any) -> None:
    want = assembled(result.pieces for result in ranks.run(trained, stage, None, compute, size=2))
    results = ranks.run(trained, stage, {"backend": "aot_eager", "fullgraph": True}, compute, size=2)
    assert_same_bits(assembled(result.pieces for result in results), want)
    for result in results:
        assert result.graphs == [1, 1, 1], "all blocks share one graph, and no step compiles anew"
        assert result.breaks == 0
        assert result.units == (2 if stage == 3 else 0)


def test_inductor_agrees_to_rounding(ranks: RankPool) -> None:
    """Fused loops add in another order than torch's kernels."""
    want = assembled(result.pieces for result in ranks.run(trained, 3, None, None, 2, size=2))
    results = ranks.run(trained, 3, {"backend": "inductor", "fullgraph": True}, None, 2, size=2)
    got = assembled(result.pieces for result in results)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_is_an_error() -> None:
    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1)

    layers = ds_zero.shard(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), sgd)
    with pytest.raises(ValueError, match="the model has no block: every unit is a single layer"):
        layers.compile()
    sharded = ds_zero.shard(seeded(), sgd)
    sharded.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled already"):
        sharded.compile(backend="eager")


class Shared(nn.Module):
    """Reads the weight of a layer that is not its own."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(4, 4), [other]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.own(x) @ self.others[0].weight)


def reading(rank: Rank, settings: dict[str, Any] | None) -> tuple[str, list[Exported]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    model = nn.Sequential(first, Shared(first), nn.Linear(4, 4), Shared(first), nn.Linear(4, 4))
    config = ds_zero.ZeroConfig(stage=3)
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    if settings is not None:
        sharded.compile(backend="aot_eager", **settings)
    try:
        for step in range(3):
            model(torch.ones(2, 4) * (step + rank.rank)).square().sum().backward()
            sharded.step()
    except torch._dynamo.exc.Unsupported as error:
        return str(error), []
    return "", exported(sharded)


def test_a_block_that_reads_a_layer_outside_is_interrupted(ranks: RankPool) -> None:
    want = assembled(pieces for _, pieces in ranks.run(reading, None, size=2))
    got = assembled(pieces for _, pieces in ranks.run(reading, {}, size=2))
    assert not any(value.isnan().any() for value in want.values())
    assert_same_bits(got, want)
    for message, _ in ranks.run(reading, {"fullgraph": True}, size=2):
        assert "a block reads a parameter of a module that lies in no block; pass the value in" in message
