"""A loop that goes on after an exception, or after gradients were kept back, has right values or is told why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from torch import Tensor, nn
from torch.nn import functional as F

DIM = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.fails: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if "forward" in self.fails:
            raise ArithmeticError("forward")
        if "backward" in self.fails:
            x = x * 1
            x.register_hook(self.fail)
        return self.linear(x)

    def fail(self, _grad: Tensor) -> None:
        raise ArithmeticError("backward")


class Model(nn.Module):
    """Reads the weight of its last block at its beginning; does not always run that block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.last = Block()
        self.runs_last = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.blocks[0](x), self.last.linear.weight)
        for block in self.blocks[1:]:
            x = block(x)
        return (self.last(x) if self.runs_last else x).square().mean()


def cut_off_in_forward(model: Model, _sharded: ds_zero.Sharded, x: Tensor) -> None:
    model.last.fails = ("forward",)
    with pytest.raises(ArithmeticError):
        model(x)
    model.last.fails = ()


def cut_off_in_backward(model: Model, sharded: ds_zero.Sharded, x: Tensor) -> None:
    model.last.fails = ("backward",)
    with pytest.raises(ArithmeticError):
        model(x).backward()
    model.last.fails = ()
    sharded.drop_gradients()


def refused_by_a_hook(model: Model, _sharded: ds_zero.Sharded, x: Tensor) -> None:
    def refuse(*_call: Any) -> None:
        raise ArithmeticError("hook")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ArithmeticError):
        model(x)
    handle.remove()


def given_a_wrong_rank(model: Model, sharded: ds_zero.Sharded, _x: Tensor) -> None:
    with pytest.raises(ValueError, match="writeback_from"), sharded.access.gathered(model.last, writeback_from=99):
        pass


def after(rank: Rank, what: Callable[..., None] | None) -> float:
    """Return the norm of the gradient of a pass that does not run the last block."""
    model = Model()
    config = ds_zero.ZeroConfig(stage=3, unit_classes=("Block",))
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(rank.rank))
    model(x).backward()
    sharded.step()
    if what is not None:
        what(model, sharded, x)
    model.runs_last = False
    model(x).backward()
    return sharded.grad_norm().value


@pytest.mark.rung_c
@pytest.mark.parametrize("what", [cut_off_in_forward, cut_off_in_backward, refused_by_a_hook, given_a_wrong_rank])
def test_parameters_are_read_right_after(ranks: RankPool, what: Callable[..., None]) -> None:
    assert ranks.run(after, what, size=2) == ranks.run(after, None, size=2)


def test_a_step_that_would_lack_kept_back_gradients_is_refused() -> None:
    model = nn.Linear(2, 1)
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=ds_zero.ZeroConfig(stage=2))
    x = torch.ones(1, 2)
    model(x).sum().backward()
    sharded.set_sync(enabled=False)
    model(x).sum().backward()
    sharded.set_sync(enabled=True)
    with pytest.raises(RuntimeError, match="the last backward pass kept its gradients on this rank"):
        sharded.grad_norm()
    with pytest.raises(RuntimeError, match="the last backward pass kept its gradients on this rank"):
        sharded.step()
    model(x).sum().backward()  # carries them along
    assert sharded.grad_norm().value == pytest.approx(3**0.5)
    sharded.step()
