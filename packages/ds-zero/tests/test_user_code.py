"""What users' models and loops do besides calling layers in a row, at every stage, equal bit for bit to no sharding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.state import assembled, exported
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.rung_c

STEPS = 4
DIM = 8


def blocks(count: int = 3) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)) for _ in range(count)])


def drawn(index: int) -> Tensor:
    return torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(index))


class Model(nn.Module):
    """Blocks in a row, which cases vary."""

    stages: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = blocks()
        self.table = nn.Embedding(7, DIM)
        self.head = nn.Linear(DIM, 1)

    def forward(self, index: int) -> Any:
        x = drawn(index)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()

    def step(self, index: int) -> None:
        """Forward and backward pass of global micro-batch ``index``."""
        self(index).backward()


# Parameters used outside their module #


class TiedByHand(Model):
    """The usual head of a language model."""

    def forward(self, index: int) -> Tensor:
        x = self.table(torch.arange(6).view(2, 3))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(x, self.table.weight).flatten(0, 1), (torch.arange(6) + index) % 7)


class OnlyOutside(Model):
    """The module that holds the parameter is never called."""

    def forward(self, index: int) -> Tensor:
        x = drawn(index)
        for block in self.blocks:
            x = block(x)
        return (x @ self.head.weight.t()).square().mean()


class Sibling(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(DIM, DIM)
        self.others = [other]  # not a child

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.own(x) @ self.others[0].weight)


class ReadBySibling(Model):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList([first, Sibling(first), nn.Linear(DIM, DIM), Sibling(first)])


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, DIM))

    def forward(self, length: int) -> Tensor:
        return self.weight[:length]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), 0.5))

    def forward(self) -> dict[str, Any]:
        return {"scale": [self.value]}


class ReturnedByTheirModule(Model):
    """Parameters and views of them leave their module, and are used after several other units ran."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.scale = Positions(), nn.ModuleList([Scale()])

    def forward(self, index: int) -> Tensor:
        position, scale = self.position(3), self.scale[0]()["scale"][0]
        x = drawn(index)
        for block in self.blocks:
            x = block(x) + position
        return (self.head(x) * scale).square().mean()


class OutsideAndRecomputed(Model):
    """The read happens a second time, in the backward pass."""

    def forward(self, index: int) -> Tensor:
        x = drawn(index)
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: torch.tanh(F.linear(block(x), self.blocks[0][2].weight)), x,
                           use_reentrant=False)  # fmt: skip
        return self.head(x).square().mean()


# Parameters that sometimes take part #


class Alternating(Model):
    """A block, and a parameter of a block, take part every other step."""

    def forward(self, index: int) -> Tensor:
        odd = index // 2 % 2
        x = self.blocks[0](drawn(index))
        x = self.blocks[1](x) if odd else self.blocks[2][0](x)
        return self.head(x).square().mean()


class PartOfUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return torch.tanh((self.odd if index % 2 else self.even)(x))


class DifferentOnEachRank(Model):
    """On two ranks each uses its own part of every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PartOfUnit() for _ in range(3)])

    def forward(self, index: int) -> Tensor:
        x = drawn(index)
        for block in self.blocks:
            x = block(x, index)
        return self.head(x).square().mean()


class BlockOnOneRank(Model):
    """On two ranks only one uses the block; at stage 3 the other could not give its part of it."""

    stages = (0, 1, 2)

    def forward(self, index: int) -> Tensor:
        x = self.blocks[0](drawn(index))
        if index % 2:
            x = self.blocks[1](x)
        return self.head(x).square().mean()


class Frozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(requires_grad=False)
        self.blocks[2][0].requires_grad_(requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.one = nn.Parameter(torch.tensor(0.5))

    def forward(self, index: int) -> Tensor:
        return super().forward(index) * self.one + self.empty.sum()


class Tied(Model):
    """One parameter in two blocks, and one block in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.extend(blocks(2))
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.blocks[4] = self.blocks[1]


class Attention(Model):
    """Reads the weight of a child without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, index: int) -> Tensor:
        x = drawn(index)
        x, _ = self.attention(x, x, x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


class Adapter(nn.Module):
    """LoRA: a frozen layer, and a trained product of two small matrices."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(2, DIM)), nn.Parameter(torch.zeros(DIM, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x @ self.down.t() @ self.up.t()
        return out


class Adapters(Model):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)
        for block in self.blocks:
            block[0] = Adapter(block[0])


# What goes in and comes out #


class Pair(NamedTuple):
    x: Tensor
    rest: dict[str, Any]


@dataclass
class Output:
    hidden: Tensor
    extra: list[Any]


class FromPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, pair: Pair) -> Output:
        return Output(torch.tanh(self.linear(pair.x)), [pair.rest, self.linear.bias])


class ToPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, *, output: Output) -> Pair:
        bias = output.extra[1]
        return Pair(self.linear(output.hidden) + bias, {"list": [output.hidden, None, 3], "name": "x"})


class Containers(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([FromPair(), ToPair(), FromPair(), ToPair()])

    def forward(self, index: int) -> Tensor:
        pair = Pair(drawn(index), {})
        for take, give in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            pair = give(output=take(pair))
        return self.head(pair.x + pair.rest["list"][0]).square().mean()


# Loops #


class ForwardTwice(Model):
    """Two forward passes before one backward pass, which is that of their sum."""

    def step(self, index: int) -> None:
        first, second = self(index), self(index + 100)
        (first + second).backward()


class Generates(TiedByHand):
    """A loop without gradients between forward and backward."""

    def step(self, index: int) -> None:
        loss = self(index)
        with torch.no_grad():
            for _ in range(3):
                self.eval()(index)
        with torch.inference_mode():
            self(index)
        self.train()
        loss.backward()


class AsksForGradients(Model):
    def forward(self, index: int) -> Tensor:
        x = drawn(index).requires_grad_()
        out = x
        for block in self.blocks:
            out = block(out)
        loss = self.head(out).square().mean()
        (slope,) = torch.autograd.grad(loss, x, retain_graph=True)
        return loss * slope.square().sum().detach()


class CarriesOnAfterAnError(ReadBySibling):
    """A forward pass that raises in a block leaves nothing behind."""

    def step(self, index: int) -> None:
        def fail(_module: nn.Module, _args: Any) -> None:
            raise ArithmeticError("in the middle")

        hook = self.blocks[1].own.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            self(index)
        hook.remove()
        super().step(index)


READING = [TiedByHand, OnlyOutside, ReadBySibling, ReturnedByTheirModule, OutsideAndRecomputed, Generates]
CASES = [
    BlockOnOneRank,
    Tied,
    Attention,
    CarriesOnAfterAnError,
    TiedByHand,
    OnlyOutside,
    ReadBySibling,
    ReturnedByTheirModule,
    OutsideAndRecomputed,
    Alternating,
    DifferentOnEachRank,
    Frozen,
    Adapters,
    Containers,
    ForwardTwice,
    Generates,
    AsksForGradients,
]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def sharded_loop(rank: Rank, case: type[Model]) -> list[Any]:
    """Train at each stage of the case; two micro-batches a step, dealt to the ranks."""
    results = []
    for stage in case.stages:
        model = case()
        sharded = ds_zero.shard(model, sgd, config=ds_zero.ZeroConfig(stage=stage), group=rank.group)
        for step in range(STEPS):
            for index in range(rank.rank, 2, rank.size):
                model.step(2 * step + index)
            sharded.step()
        assert sharded.memory().peak_units <= 2 or case not in READING, "a read makes no third unit whole"
        results.append(exported(sharded))
    return results


def plain_loop(case: type[Model]) -> dict[str, Tensor]:
    """Train without sharding: the gradients of two micro-batches are added, and halved."""
    model = case()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = sgd(trained)
    for step in range(STEPS):
        leaves = []
        for index in range(2):
            model.step(2 * step + index)
            leaves.append([torch.zeros_like(p) if p.grad is None else p.grad for p in trained])
            optimizer.zero_grad()
        for param, first, second in zip(trained, *leaves, strict=True):
            param.grad = (first + second) * 0.5
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().flatten() for name, param in model.named_parameters() if param.numel()}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_without_sharding(ranks: RankPool, case: type[Model]) -> None:
    want = plain_loop(case)
    for size in (1, 2):
        for stage, pieces in zip(case.stages, zip(*ranks.run(sharded_loop, case, size=size), strict=True), strict=True):
            got = assembled(pieces)
            different = [name for name in want if not torch.equal(got["param", name], want[name])]
            assert not different, f"stage {stage}, {size} ranks: {different}"


# Hooks of users #


def with_hooks(model: Model, record: Callable[[str, Tensor | None], None]) -> None:
    """Every kind of hook a user may install on a block."""
    block = model.blocks[1]
    block.register_forward_pre_hook(lambda _m, args: record("input", args[0]))
    block.register_forward_hook(lambda _m, _args, out: record("output", out))
    block.register_full_backward_pre_hook(lambda _m, grads: record("output gradient", grads[0]))
    block.register_full_backward_hook(lambda _m, grads, _out: record("input gradient", grads[0]))
    block[0].weight.register_hook(lambda grad: record("gradient", grad))
    block[0].weight.register_post_accumulate_grad_hook(lambda param: record("accumulated", param.grad))


def recorded(rank: Rank, stage: int, when: str) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def record(name: str, value: Tensor | None) -> None:
        assert value is not None, name
        seen[name] = value.detach().clone()

    model = Model()
    if when == "before":
        with_hooks(model, record)
    if stage >= 0:
        sharded = ds_zero.shard(model, sgd, config=ds_zero.ZeroConfig(stage=stage), group=rank.group)
    if when == "after":
        with_hooks(model, record)
    for index in range(3):
        model.step(index)
        if stage >= 0:
            sharded.drop_gradients()
        model.zero_grad()
    return seen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hooks_of_users_see_what_they_would_see(ranks: RankPool, stage: int, when: str) -> None:
    want, _ = ranks.run(recorded, -1, when, size=2)
    assert len(want) == 6
    for got in ranks.run(recorded, stage, when, size=2):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


# Several in one process #


def two_at_once(rank: Rank, interleaved: bool) -> list[Any]:
    """Two models, one sharded over all ranks at stage 3, the other at stage 1, the second fed by the first."""
    first, second = Model(), TiedByHand()
    pair = [
        ds_zero.shard(model, sgd, config=ds_zero.ZeroConfig(stage=stage), group=rank.group)
        for model, stage in ((first, 3), (second, 1))
    ]
    order = [(step, which) for step in range(STEPS) for which in (0, 1)]
    if not interleaved:
        order.sort(key=lambda entry: entry[1])
    for step, which in order:
        (first, second)[which].step(2 * step + rank.rank)
        if interleaved:
            (first, second)[1 - which](step)  # a forward pass nobody uses
        pair[which].step()
    return [exported(sharded) for sharded in pair]


def test_several_models_in_one_process(ranks: RankPool) -> None:
    apart, together = (list(zip(*ranks.run(two_at_once, mixed, size=2), strict=True)) for mixed in (False, True))
    for alone, mixed in zip(apart, together, strict=True):
        want, got = assembled(alone), assembled(mixed)
        assert all(torch.equal(got[key], want[key]) for key in want)


# What cannot be seen #


class KeptInAList(Model):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.table.weight]

    def forward(self, index: int) -> Tensor:
        x = drawn(index)
        for block in self.blocks:
            x = block(x)
        return (x @ self.kept[0].t()).square().mean()


def unseen(rank: Rank) -> str:
    model = KeptInAList()
    sharded = ds_zero.shard(model, sgd, config=ds_zero.ZeroConfig(stage=3), group=rank.group)
    try:
        model.step(rank.rank)
    except RuntimeError as error:
        sharded.drop_gradients()
        return str(error)
    return ""


def test_a_read_that_cannot_be_seen_is_an_error_with_the_name(ranks: RankPool) -> None:
    for message in ranks.run(unseen, size=2):
        assert "parameter 'table.weight' took part in a forward pass without being read from its module" in message


def read_elsewhere(rank: Rank) -> tuple[bool, bool]:
    model = Model()
    ds_zero.shard(model, sgd, config=ds_zero.ZeroConfig(stage=3), group=rank.group)
    outside = bool(model.head.weight.isnan().all()) if rank.rank == 0 else True  # one rank alone: nothing is sent
    seen = []
    hook = model.blocks[0][0].weight.register_hook(lambda _: seen.append(rank.rank or bool(model.head.weight.numel())))
    model.step(rank.rank)
    hook.remove()
    return outside, len(seen) == 1


def test_reads_outside_a_forward_pass_communicate_nothing(ranks: RankPool) -> None:
    assert ranks.run(read_elsewhere, size=2) == [(True, True)] * 2
