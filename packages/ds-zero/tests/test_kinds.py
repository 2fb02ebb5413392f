"""Every kind of parameter trains as it does without sharding: frozen, unused, tied, empty, of several data types."""

from __future__ import annotations

from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Block, seeded
from ds_testkit.state import assembled, exported
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c


class Odd(nn.Module):
    """One model with everything that is unusual about parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 1)
        self.blocks = nn.ModuleList([Block(16, 2) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.ones(0, 5))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.never = nn.Linear(4, 4)
        if kind == "frozen":
            self.blocks[1].requires_grad_(False)
            self.first.weight.requires_grad_(False)
        if kind == "adapters":
            self.requires_grad_(False)
            for block in self.blocks:
                block.out.requires_grad_(True)
        if kind == "tied blocks":
            self.blocks[2].fc.weight = self.blocks[0].fc.weight
        if kind == "attention":
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        if kind == "shared block":
            self.blocks[2] = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            if not (self.kind == "skipped" and index == 1):
                x = block(x)
        if self.kind == "attention":
            x, _ = self.attention(x, x, x)  # reads its projection's weight without calling it
        out: Tensor = (self.last(x) * self.scale + self.scalar + self.empty.sum()).square().mean()
        return out


KINDS = ["plain", "frozen", "adapters", "tied blocks", "shared block", "skipped", "attention"]


def inputs(index: int) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(index))


def train_odd(rank: Rank, kind: str, stage: int) -> list[Any]:
    model = Odd(kind)
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        config=ds_zero.ZeroConfig(stage=stage),
        group=rank.group,
    )
    for step in range(5):
        for index in range(rank.rank, 4, rank.size):
            model(inputs(4 * step + index)).backward()
        sharded.step()
    assert all(not vars(param) for param in model.parameters()), "nothing is hung on parameters"
    return exported(sharded)


def train_plain(kind: str) -> dict[str, Tensor]:
    model = Odd(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        for index in range(4):
            (model(inputs(4 * step + index)) / 4).backward()
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_without_sharding(ranks: RankPool, kind: str, stage: int) -> None:
    got = assembled(ranks.run(train_odd, kind, stage, size=2))
    for name, want in train_plain(kind).items():
        if want.numel():  # an empty tensor has no piece
            torch.testing.assert_close(got["param", name], want.reshape(-1), rtol=2e-5, atol=2e-6)
    alone = assembled(ranks.run(train_odd, kind, stage, size=1))
    assert all(torch.equal(got[key], alone[key]) for key in alone)


def mixed_types(rank: Rank, stage: int) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    model[2].bfloat16()
    model.register_parameter("steps", nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False))
    sharded = ds_zero.shard(
        model, lambda groups: torch.optim.SGD(groups, lr=0.1), config=ds_zero.ZeroConfig(stage=stage), group=rank.group
    )
    for _ in range(3):
        model[2](model[1](model[0](torch.ones(1, 8))).bfloat16()).sum().backward()
        sharded.step()
    assert model.steps.dtype == torch.long
    return exported(sharded)


@pytest.mark.parametrize("stage", [1, 3])
def test_several_data_types_in_one_model(ranks: RankPool, stage: int) -> None:
    one, two = (assembled(ranks.run(mixed_types, stage, size=size)) for size in (1, 2))
    assert one["param", "2.weight"].dtype == torch.float32, "the master of a bfloat16 parameter"
    assert all(torch.equal(one[key], two[key]) for key in one)


def groups_of_settings(rank: Rank) -> list[Any]:
    model = seeded()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    sharded = ds_zero.shard(
        model,
        lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        config=ds_zero.ZeroConfig(stage=2),
        group=rank.group,
        param_groups=[{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0, "lr": 0.0}],
    )
    tokens = torch.arange(17).view(1, -1)
    model(tokens).backward()
    sharded.step()
    return exported(sharded)


def test_parameter_groups_keep_their_settings(ranks: RankPool) -> None:
    got = assembled(ranks.run(groups_of_settings, size=4))
    model = seeded()
    for name, param in model.named_parameters():
        moved = not torch.equal(got["param", name], param.detach().reshape(-1))
        assert moved == (param.dim() > 1), name


def test_float64_is_refused_with_a_way_out() -> None:
    with pytest.raises(NotImplementedError, match=r"'weight' is torch.float64.*model.float\(\)"):
        ds_zero.shard(nn.Linear(2, 2).double(), torch.optim.AdamW)


def test_groups_must_be_the_models_and_disjoint() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"group 0 holds a parameter of shape \[3, 3\] that is not the model's"):
        ds_zero.shard(model, torch.optim.AdamW, param_groups=[{"params": other.parameters()}])
    with pytest.raises(ValueError, match="'weight' stands in more than one"):
        ds_zero.shard(model, torch.optim.AdamW, param_groups=[{"params": [model.weight]}, {"params": model.weight}])
