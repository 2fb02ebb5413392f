"""Ranks that do not mean the same are told so, all of them, before messages hang or are misread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ds_comm.codecs import BlockCodec
from ds_comm.compressed import CompressedCollectives
from ds_comm.optim import CompressedAdam, Link, OneBitAdam
from ds_testkit import Rank, RankPool
from torch import nn

from .messages import Messages


def tensors(*numels: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(numel)) for numel in numels]


CASES: dict[str, tuple[Callable[[int, Link], Any], str]] = {
    "shapes": (
        lambda rank, link: CompressedAdam(tensors(3, 4 + rank), link=link),
        r"on rank 0: parameter 1 of a group, \(4,\), torch.float32; on rank 1: parameter 1 of a group, \(5,\)",
    ),
    "a tensor less": (
        lambda rank, link: CompressedAdam(tensors(3, 4)[: 2 - rank], link=link),
        r"on rank 0: parameter 1 of a group, \(4,\), torch.float32; on rank 1: nothing",
    ),
    "a group less": (
        lambda rank, link: CompressedAdam([{"params": tensors(3)} for _ in range(2 - rank)], link=link),
        r"on rank 0: parameter 0 of a group, \(3,\), .*; on rank 1: a step of CompressedAdam, 1 parameter groups",
    ),
    "codes": (
        lambda rank, link: CompressedAdam(tensors(300), codec=BlockCodec(code=("int4", "int8")[rank]), link=link),
        "on rank 0: codes in blocks of 256, .* bytes for 300 elements; on rank 1: codes in blocks of 256, .* bytes",
    ),
    "ends of the warm-up": (
        lambda rank, link: OneBitAdam(tensors(3), freeze_step=5 + rank, link=link),
        "on rank 0: freeze_step = 5; on rank 1: freeze_step = 6",
    ),
    "learning rates": (
        lambda rank, link: CompressedAdam(tensors(3), lr=0.1 / (1 + rank), link=link),
        "on rank 0: lr = 0.1; on rank 1: lr = 0.05",
    ),
}


def stepped(rank: Rank, name: str) -> str:
    make, _ = CASES[name]
    with pytest.raises(ValueError, match="all ranks must give") as caught:
        make(rank.rank, Link(group=rank.group)).step()
    # the group is as good as before
    optimizer = CompressedAdam(tensors(3), link=Link(group=rank.group))
    optimizer.step()
    return str(caught.value)


@pytest.mark.rung_c
@pytest.mark.parametrize("name", CASES)
def test_what_differs_is_named_on_all_ranks(ranks: RankPool, name: str) -> None:
    _, message = CASES[name]
    for text in ranks.run(stepped, name, size=2):
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)


def named(rank: Rank) -> None:
    with pytest.raises(ValueError, match=r"gradients must be a codec, not a name: such as .*BlockCodec.*; got 'int4'"):
        CompressedCollectives(Messages(rank), gradients="int4")  # type: ignore[arg-type]


@pytest.mark.rung_c
def test_a_name_is_no_codec(ranks: RankPool) -> None:
    ranks.run(named, size=1)
    with pytest.raises(ValueError, match=r"codec must be a codec, not a name: such as .*; got 'int4'"):
        CompressedAdam(tensors(3), codec="int4")  # type: ignore[arg-type]
