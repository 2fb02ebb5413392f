"""Single parameters, gradients and optimizer state, read and written at every stage as on one rank."""

from __future__ import annotations

from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.state import assembled, assert_same_bits, exported
from torch import Tensor

from .helpers import Run, build, train_steps

NAMES = ["tokens.weight", "blocks.1.fc.weight", "blocks.0.norm1.bias", "norm.weight", "head.weight"]
pytestmark = pytest.mark.rung_c


def read(rank: Rank, run: Run) -> dict[tuple[str, str], Tensor]:
    """Read everything by name, also from what is local on each rank."""
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(2))
    model(torch.full((2, 5), rank.rank)).backward()
    access, found = sharded.access, {}
    for name in NAMES:
        param = model.get_parameter(name)
        found["param", name] = access.full_param(name)
        found["sum", name] = access.full_grad(param, reduction="sum")
        found["grad", name] = access.full_grad(param)
        found["exp_avg", name] = access.full_state(param, "exp_avg")
        for kind, own, whole in (
            ("param", access.local_param(name), found["param", name]),
            ("grad", access.local_grad(name), found["sum", name]),
            ("state", access.local_state(name, "exp_avg"), found["exp_avg", name]),
        ):
            part = whole.reshape(-1)[own.start : own.start + own.data.numel()]
            assert torch.equal(own.data, part), (kind, name)
    with pytest.raises(KeyError, match=r"no tensor 'nothing' like parameter 'norm.weight'"):
        access.full_state("norm.weight", "nothing")
    exact = assembled([exported(sharded)]) if rank.size == 1 else {}
    for name in NAMES if exact else []:
        assert torch.equal(found["param", name].reshape(-1), exact["param", name])
        assert torch.equal(found["exp_avg", name].reshape(-1), exact["exp_avg", name])
    return found


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_reads_are_those_of_one_rank(ranks: RankPool, compute: torch.dtype | None) -> None:
    run = Run(compute=compute)
    for size in (1, 2, 4):
        wants = [ranks.run(read, run._replace(stage=stage), size=size) for stage in range(4)]
        for of_stage in wants:
            for found in of_stage:
                for key, value in found.items():
                    assert torch.equal(value, wants[0][0][key]), (size, key)
    one = ranks.run(read, run, size=1)[0]
    for (kind, name), value in wants[0][0].items():
        if kind in ("param", "exp_avg"):  # the gradient is of different batches
            assert torch.equal(value, one[kind, name])
        if kind == "grad":
            assert torch.equal(value * 4, wants[0][0]["sum", name])


def written(rank: Rank, run: Run, local: bool) -> Any:
    """Write known values, in full or rank by rank, then step."""
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(1))
    for index in range(rank.rank, 4, rank.size):
        model(torch.full((2, 5), index)).backward()
    access = sharded.access
    before = sharded.grad_norm().value
    for name in NAMES:
        generator = torch.Generator().manual_seed(5)
        shape = model.get_parameter(name).shape
        value, grad, moment = (torch.randn(shape, generator=generator) for _ in range(3))
        if local:
            flat = value.reshape(-1)
            own = access.local_param(name)
            access.set_local_param(name, flat[own.start : own.start + own.data.numel()])
            own = access.local_grad(name)
            access.set_local_grad(name, 4 * grad.reshape(-1)[own.start : own.start + own.data.numel()])
        else:
            access.set_full_param(name, value)
            access.set_full_grad(name, grad)
        access.set_full_state(name, "exp_avg", moment)
        assert torch.equal(access.full_param(name), value)
        assert torch.equal(access.full_grad(name), grad)
        assert torch.equal(access.full_state(name, "exp_avg"), moment)
    assert sharded.grad_norm().value > 2 * before
    loss = model(torch.full((2, 5), 3)).item()  # sees what was written
    sharded.step()
    return exported(sharded), loss


@pytest.mark.parametrize("local", [False, True], ids=["full", "local"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_writes_reach_masters_copies_and_replicas(ranks: RankPool, compute: torch.dtype | None, local: bool) -> None:
    want, loss = ranks.run(written, Run(compute=compute, stage=0), False, size=1)[0]
    for size, stage in ((1, 2), (2, 0), (2, 1), (4, 2), (4, 3)):
        results = ranks.run(written, Run(compute=compute, stage=stage), local, size=size)
        assert_same_bits(assembled(pieces for pieces, _ in results), assembled([want]))
        assert {result[1] for result in results} == {loss}


def test_mistakes_change_nothing() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    access = ds_zero.shard(model, lambda groups: torch.optim.SGD(groups, lr=0.1)).access
    before = model.weight.clone()
    for message, action in (
        ("no parameter 'weights'; it has", lambda: access.full_param("weights")),
        ("not one of the partitioned model's", lambda: access.full_param(torch.nn.Parameter(torch.ones(2)))),
        (
            r"has shape \[2, 3\], got a value of shape \[3, 2\]",
            lambda: access.set_full_param("weight", torch.ones(3, 2)),
        ),
        ("holds 6 elements of it, got", lambda: access.set_local_param("weight", torch.ones(5))),
        ("'bias' is not trained", lambda: access.full_grad("bias")),
        ("reduction is 'mean' or 'sum', got 'max'", lambda: access.full_grad("weight", reduction="max")),
    ):
        with pytest.raises(ValueError, match=message):
            action()
    with pytest.raises(RuntimeError, match="no gradient has been sent"):
        access.full_grad("weight")
    assert torch.equal(model.weight, before)
    assert torch.equal(access.full_param("bias"), model.bias)
