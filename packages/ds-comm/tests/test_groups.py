"""Groups without parameters and parameters without elements, which torch allows: nothing is changed by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ds_comm.optim import Link
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

from . import training


def trained(rank: Rank, name: str, around: tuple[int, int]) -> tuple[list[Tensor], dict[int, Any]]:
    """Weights after each step, saved and loaded on the way."""
    params, link = training.parameters(), Link(group=rank.group)
    optimizer = training.make(name, params, link, around=around)
    seen = []
    for step in range(1, 25):
        training.set_gradients(params, rank.rank, step)
        optimizer.step()
        seen.append(training.flat(params))
        if step == 12:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = training.make(name, params, link, around=around)
            optimizer.load_state_dict(state)
    return seen, optimizer.state_dict()["state"]


@pytest.mark.rung_c
@pytest.mark.parametrize("around", [(1, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize("name", training.CODES)
def test_groups_without_parameters_change_no_bit(ranks: RankPool, name: str, around: tuple[int, int]) -> None:
    plain, found = (ranks.run(trained, name, each, size=2) for each in ((0, 0), around))
    for (seen, state), (wanted, wanted_state) in zip(found, plain, strict=True):
        assert all(map(torch.equal, seen, wanted))
        assert all(torch.equal(state[index]["error"], each["error"]) for index, each in wanted_state.items())
        assert len(state) == len(wanted_state) == 3


@pytest.mark.parametrize("name", training.CODES)
def test_no_parameter_at_all_is_named(name: str) -> None:
    params: list[nn.Parameter] = []
    groups = [{"params": params}, {"params": []}]
    inner = torch.optim.SGD(groups)
    kinds = {kind.__name__: kind for kind in (training.OneBitAdam, training.OneBitLamb, training.ZeroOneAdam)}
    optimizer: torch.optim.Optimizer
    if name == "LocalSteps":
        optimizer = training.LocalSteps(inner, every=2)
    else:
        optimizer = kinds.get(name, training.CompressedAdam)(groups)
    with pytest.raises(ValueError, match="there must be a parameter in some group; got 2 groups without any"):
        optimizer.step()


def trained_with(rank: Rank, name: str, *numels: int) -> list[Tensor]:
    params, link = training.parameters(), Link(group=rank.group)
    optimizer = training.make(name, params, link)
    if numels:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(numel)) for numel in numels]})
    if name == "LocalSteps":
        optimizer.inner = torch.optim.SGD(params, lr=0.05)
    seen = []
    for step in range(1, 25):
        training.set_gradients(params, rank.rank, step)
        optimizer.step()
        seen.append(training.flat(params))
    return seen


@pytest.mark.rung_c
@pytest.mark.parametrize("name", training.CODES)
def test_parameters_without_elements_change_no_bit(ranks: RankPool, name: str) -> None:
    plain, found = (ranks.run(trained_with, name, *numels, size=2) for numels in ((), (0, 0)))
    for seen, wanted in zip(found, plain, strict=True):
        assert all(map(torch.equal, seen, wanted))
