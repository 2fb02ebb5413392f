"""1-bit optimizers over partitioned state: ranks that mean different things; groups and tensors without elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ds_zero
import pytest
import torch
from ds_comm.codecs import BlockCodec, E8Codec
from ds_comm.sharded.one_bit_adam import OneBitAdam
from ds_comm.sharded.one_bit_lamb import Coefficients, OneBitLamb
from ds_comm.sharded.zero_one_adam import Intervals, ZeroOneAdam
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

pytestmark = pytest.mark.rung_c

SAME_SIZE = (E8Codec(), BlockCodec(code="sign", scale_dtype=torch.float16))

DIFFERENT: dict[str, tuple[Callable[[int, Any], torch.optim.Optimizer], str]] = {
    "codes of as many bytes": (
        lambda rank, groups: OneBitAdam(groups, codec=SAME_SIZE[rank]),
        r"on rank 0: codes: E8Codec\(block=512\); on rank 1: codes: sign in blocks of 256, scales torch\.float16",
    ),
    "ends of the warm-up": (
        lambda rank, groups: OneBitAdam(groups, freeze_step=5 + rank),
        "on rank 0: freeze_step = 5; on rank 1: freeze_step = 6",
    ),
    "coefficients": (
        lambda rank, groups: OneBitLamb(groups, coefficients=Coefficients(beta=(0.9, 0.95)[rank])),
        r"on rank 0: coefficients = .*beta=0\.9, .*; on rank 1: coefficients = .*beta=0\.95, ",
    ),
    "intervals": (
        lambda rank, groups: ZeroOneAdam(groups, intervals=Intervals(local_step_clipper=8 + rank)),
        r"on rank 0: intervals = .*local_step_clipper=8\).*; on rank 1: intervals = .*local_step_clipper=9\)",
    ),
}


def model_of(*extra: int) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    for index, numel in enumerate(extra):
        model.register_parameter(f"extra{index}", nn.Parameter(torch.ones(numel)))
    return model


def refused(rank: Rank, name: str) -> str:
    make, _ = DIFFERENT[name]
    with pytest.raises(ValueError, match="all ranks must give an optimizer that exchanges") as caught:
        ds_zero.shard(
            model_of(),
            lambda groups: make(rank.rank, groups),
            config=ds_zero.ZeroConfig(stage=1),
            group=rank.group,
        )
    return str(caught.value)


def test_codes_of_other_bytes_can_be_as_many() -> None:
    first, second = SAME_SIZE
    assert first.payload_bytes(1 << 20) == second.payload_bytes(1 << 20)
    assert not torch.equal(first.encode(torch.ones(1024)), second.encode(torch.ones(1024)))


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_on_all_ranks(ranks: RankPool, name: str) -> None:
    _, message = DIFFERENT[name]
    for text in ranks.run(refused, name, size=2):
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "OneBitAdam": lambda groups: OneBitAdam(groups, lr=0.01, freeze_step=3),
    "OneBitLamb": lambda groups: OneBitLamb(groups, lr=0.01, freeze_step=3),
    "ZeroOneAdam": lambda groups: ZeroOneAdam(
        groups, lr=0.01, intervals=Intervals(3, var_update_scaler=1, local_step_scaler=1, local_step_clipper=2)
    ),
}


def trained(rank: Rank, name: str, around: tuple[int, int], extra: int) -> list[Tensor]:
    """Weights after each step, with groups without parameters before and after the others, and tensors of nothing."""
    model = model_of(*[0] * extra)
    params = [param for name, param in model.named_parameters() if param.numel()]
    empty = [param for param in model.parameters() if not param.numel()]
    before, after = ([{"params": []} for _ in range(count)] for count in around)
    sharded = ds_zero.shard(
        model,
        MAKERS[name],
        param_groups=[*before, {"params": params[:2] + empty}, {"params": params[2:], "weight_decay": 0.1}, *after],
        config=ds_zero.ZeroConfig(stage=1),
        group=rank.group,
    )
    seen = []
    for step in range(8):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank.rank))
        loss = (model(x) - x.flip(1)).square().mean() + sum(each.sum() for each in empty)
        loss.backward()
        sharded.step()
        seen.append(torch.cat([param.detach().view(-1).clone() for param in params]))
    return seen


@pytest.mark.parametrize(("around", "extra"), [((1, 0), 0), ((0, 2), 0), ((0, 0), 1), ((1, 1), 2)])
@pytest.mark.parametrize("name", MAKERS)
def test_groups_and_tensors_without_elements_change_no_bit(
    ranks: RankPool, name: str, around: tuple[int, int], extra: int
) -> None:
    plain = ranks.run(trained, name, (0, 0), 0, size=2)
    for seen, wanted in zip(ranks.run(trained, name, around, extra, size=2), plain, strict=True):
        assert all(map(torch.equal, seen, wanted))
        assert not torch.equal(seen[-1], seen[3]), "weights move"
