"""Ranks that do not mean the same are told so, all of them, before messages hang or are misread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ds_comm.codecs import BlockCodec, E8Codec, HadamardCodec
from ds_comm.compressed import CompressedCollectives
from ds_comm.optim import CompressedAdam, Link, OneBitAdam
from ds_testkit import Rank, RankPool
from torch import nn

from .messages import Messages


def tensors(*numels: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(numel)) for numel in numels]


class Flagged(CompressedAdam):
    """With a setting of its own."""

    def __init__(self, params: list[nn.Parameter], *, flag: bool, link: Link) -> None:
        self.flag = flag
        super().__init__(params, link=link)


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
        r"on rank 0: codes: int4 in blocks of 256, scales torch\.float32; on rank 1: codes: int8 in blocks of 256",
    ),
    "codes of as many bytes": (
        lambda rank, link: OneBitAdam(
            tensors(600), codec=(E8Codec(), BlockCodec(code="sign", block=512))[rank], link=link
        ),
        r"on rank 0: codes: E8Codec\(block=512\); on rank 1: codes: sign in blocks of 512",
    ),
    "codes within codes": (
        lambda rank, link: CompressedAdam(
            tensors(600), codec=HadamardCodec(inner=(E8Codec(), BlockCodec(code="sign", block=512))[rank]), link=link
        ),
        r"on rank 0: codes: E8Codec\(block=512\), of rotations of 64; on rank 1: codes: sign in blocks of 512",
    ),
    "numbers of groups, the first without parameters": (
        lambda rank, link: CompressedAdam(
            [{"params": []}, {"params": tensors(3)}, *[{"params": []}] * rank], link=link
        ),
        "on rank 0: a step of CompressedAdam, 2 parameter groups; on rank 1: nothing",
    ),
    "groups without parameters": (
        lambda rank, link: CompressedAdam([{"params": tensors(3) * (rank == 1)}, {"params": tensors(4)}], link=link),
        r"on rank 0: nothing; on rank 1: parameter 0 of a group, \(3,\)",
    ),
    "data types of exact messages": (
        lambda rank, link: OneBitAdam(
            tensors(3), link=replace(link, exact_dtype=(torch.float32, torch.bfloat16)[rank])
        ),
        r"on rank 0: exact_dtype = torch\.float32; on rank 1: exact_dtype = torch\.bfloat16",
    ),
    "what is done with what is not finite": (
        lambda rank, link: OneBitAdam(tensors(3), link=replace(link, on_nonfinite=("raise", "skip")[rank])),
        "on rank 0: on_nonfinite = raise; on rank 1: on_nonfinite = skip",
    ),
    "a flag that is kept as an attribute": (
        lambda rank, link: Flagged(tensors(3), flag=rank == 1, link=link),
        "on rank 0: flag = False; on rank 1: flag = True",
    ),
    "corrections": (
        lambda rank, link: CompressedAdam(tensors(3), bias_correction=rank == 1, link=link),
        "on rank 0: bias_correction = False; on rank 1: bias_correction = True",
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
