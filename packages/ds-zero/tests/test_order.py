"""What a program may do besides forward, backward, step in a row: branches, evaluation, recomputation, exceptions."""

from __future__ import annotations

import math
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import assembled, assert_same_bits, exported
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .helpers import Run, assemble_run, build, train_steps

pytestmark = pytest.mark.rung_c


def with_evaluation(rank: Rank, run: Run) -> list[Any]:
    model, sharded = build(rank, run)
    for step in range(run.steps):
        with torch.no_grad():
            model.eval()(micro_batch(99))
        model.train()
        model(micro_batch(98))  # a forward pass nobody uses
        train_steps(rank, run, model, sharded, [step])
    return exported(sharded)


def recomputed(rank: Rank, run: Run, use_reentrant: bool) -> list[Any]:
    model, sharded = build(rank, run)
    for block in model.blocks:
        block.forward = _checkpointed(block.forward, use_reentrant)
    train_steps(rank, run, model, sharded, range(run.steps))
    return exported(sharded)


def recomputed_outside(rank: Rank, run: Run, use_reentrant: bool) -> list[Any]:
    model, sharded = build(rank, run)
    blocks = list(model.blocks)
    model.blocks = nn.ModuleList([_Outer(block, use_reentrant) for block in blocks])
    train_steps(rank, run, model, sharded, range(run.steps))
    return exported(sharded)


class _Outer(nn.Module):
    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


def _checkpointed(forward: Any, use_reentrant: bool) -> Any:
    return lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)


def accumulated_backward(rank: Rank, run: Run) -> list[Any]:
    """Two losses of one forward pass, and two forward passes before their backward passes."""
    model, sharded = build(rank, run)
    for step in range(run.steps):
        batches = [micro_batch(step * run.num_micro_batches + i) for i in range(rank.rank, 4, rank.size)]
        losses = [model(batch) for batch in batches]
        for loss in losses:
            loss.backward()
        norm = sharded.grad_norm().value
        sharded.step(min(1.0, run.clip / norm))
    return exported(sharded)


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_in_between_changes_nothing(ranks: RankPool, stage: int) -> None:
    run = Run(stage=stage, steps=4)
    assert_same_bits(assembled(ranks.run(with_evaluation, run, size=2)), assemble_run(ranks, run, size=2))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor hooks", "reentrant"])
@pytest.mark.parametrize("place", [recomputed, recomputed_outside], ids=["inside", "outside"])
@pytest.mark.parametrize("stage", [2, 3])
def test_recomputed_activations(ranks: RankPool, stage: int, place: Any, use_reentrant: bool) -> None:
    run = Run(stage=stage, steps=4)
    got = assembled(ranks.run(place, run, use_reentrant, size=2))
    want = assemble_run(ranks, run, size=2)
    assert_same_bits(got, want)


class Frozen(nn.Module):
    """Trained adapters in blocks that are recomputed; everything outside them is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)])
        self.head = nn.Linear(8, 1).requires_grad_(requires_grad=False)
        for block in self.blocks:
            block[2].requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        out: Tensor = self.head(x).square().mean()
        return out


def norm_of_recomputed(rank: Rank, stage: int) -> tuple[int, float]:
    model = Frozen()
    config = ds_zero.ZeroConfig(stage=stage)
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    model(torch.ones(2, 8, requires_grad=True)).backward()
    return sharded.micro_batches, sharded.grad_norm().value


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recomputation_within_a_backward_pass_is_part_of_it(ranks: RankPool, stage: int) -> None:
    model = Frozen()
    model(torch.ones(2, 8, requires_grad=True)).backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for micro_batches, norm in ranks.run(norm_of_recomputed, stage, size=2):
        assert micro_batches == 1
        assert norm == pytest.approx(want.item(), rel=1e-5)


def with_penalty(rank: Rank, run: Run) -> tuple[int, list[Any]]:
    """A term of the loss is the gradient of another: ``torch.autograd.grad`` runs a pass that writes no gradient."""
    model, sharded = build(rank, run)
    micro_batches = 0
    for step in range(run.steps):
        loss = model(micro_batch(step * 2 + rank.rank))
        (slope,) = torch.autograd.grad(loss, model.norm.bias, create_graph=True, retain_graph=True)
        (loss + slope.square().sum()).backward()
        micro_batches = sharded.micro_batches
        sharded.step()
    return micro_batches, exported(sharded)


def test_gradients_asked_for_in_between_do_not_count(ranks: RankPool) -> None:
    run = Run(steps=2, num_micro_batches=2)
    states = []
    for stage in (0, 2, 3):
        results = ranks.run(with_penalty, run._replace(stage=stage), size=2)
        assert [micro_batches for micro_batches, _ in results] == [1, 1]
        states.append(assembled(state for _, state in results))
    for state in states[1:]:
        assert_same_bits(state, states[0])


@pytest.mark.parametrize("stage", [2, 3])
def test_several_forward_passes_before_backward(ranks: RankPool, stage: int) -> None:
    run = Run(stage=stage, steps=4)
    assert_same_bits(assembled(ranks.run(accumulated_backward, run, size=2)), assemble_run(ranks, run, size=2))


class Branching(nn.Module):
    """Takes its blocks in another order, or leaves some out, from call to call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)])

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for index in order:
            x = self.blocks[index](x)
        return x.square().mean()


ORDERS = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2, 4], [1, 1, 3], [0, 1, 2, 3, 4]]


def branching(rank: Rank, stage: int) -> list[Any]:
    model = Branching()
    config = ds_zero.ZeroConfig(stage=stage)
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    for step, order in enumerate(ORDERS):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        for index in range(rank.rank, 2, rank.size):
            model(x[index], order).backward()
        sharded.step()
    return exported(sharded)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_order_of_units_may_change(ranks: RankPool, stage: int) -> None:
    model = Branching()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, order in enumerate(ORDERS):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        (sum(model(x[index], order) for index in range(2)) / 2).backward()
        optimizer.step()
    two, one = (assembled(ranks.run(branching, stage, size=size)) for size in (2, 1))
    for name, param in model.named_parameters():
        torch.testing.assert_close(two["param", name], param.detach().reshape(-1), rtol=1e-5, atol=1e-7)
    assert_same_bits(two, one)


def without_sync(rank: Rank, run: Run, every: int) -> list[Any]:
    model, sharded = build(rank, run)
    for step in range(run.steps):
        mine = range(rank.rank, run.num_micro_batches, rank.size)
        for count, index in enumerate(mine, start=1):
            sharded.set_sync(enabled=count % every == 0)
            model(micro_batch(step * run.num_micro_batches + index)).backward()
        sharded.step()
    return exported(sharded)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_may_add_up_before_they_are_sent(ranks: RankPool, stage: int) -> None:
    run = Run(stage=stage, steps=4, num_micro_batches=8, clip=None, optimizer="SGD")
    got = assembled(ranks.run(without_sync, run, 4, size=2))
    for key, want in assemble_run(ranks, run, size=2).items():
        torch.testing.assert_close(got[key], want, rtol=1e-4, atol=1e-6)


def test_backward_that_raised_has_to_be_dropped() -> None:
    model = seeded()
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=ds_zero.ZeroConfig(stage=1))

    def fail(_grad: Tensor) -> None:
        raise ArithmeticError("in the middle")

    x = model.blocks[0].register_forward_hook(lambda _m, _a, out: out.register_hook(fail) and None)
    with pytest.raises(ArithmeticError):
        model(micro_batch(0)).backward()
    x.remove()
    with pytest.raises(RuntimeError, match=r"did not finish .* drop_gradients\(\)"):
        model(micro_batch(0))
    sharded.drop_gradients()
    before = model.head.weight.detach().clone()
    model(micro_batch(0)).backward()
    sharded.step()
    assert not torch.equal(model.head.weight, before)


def test_step_needs_a_gradient_and_an_optimizer() -> None:
    model = seeded()
    sharded = ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1))
    with pytest.raises(RuntimeError, match=r"no backward pass since the last step"):
        sharded.step()
    frozen = ds_zero.shard(seeded(), None)
    frozen.drop_gradients()
    with pytest.raises(RuntimeError, match="sharded without an optimizer"):
        frozen.step()


def parts_by_hand(rank: Rank, run: Run) -> tuple[bool, bool, list[Any]]:
    """What a pipeline does: parameters whole over several calls, gradients sent before the pass ends."""
    model, sharded = build(rank, run)
    block = model.blocks[0]
    whole = True
    for step in range(run.steps):
        sharded.unshard(block)
        memory = block.fc.weight.data_ptr()
        for index in range(rank.rank, run.num_micro_batches, rank.size):
            loss = model(micro_batch(step * run.num_micro_batches + index))
            hook = model.blocks[1].fc.weight.register_post_accumulate_grad_hook(lambda _: sharded.reduce(model.head))
            loss.backward()
            hook.remove()
            # not gathered anew, although two other blocks have been whole since
            whole = whole and block.fc.weight.data_ptr() == memory and not block.fc.weight.isnan().any()
        sharded.reshard(block)
        norm = sharded.grad_norm()
        assert norm.value == math.sqrt(math.fsum(norm.squares)) * (1.0 / run.num_micro_batches)
        sharded.step(min(1.0, run.clip / norm.value))
    return bool(whole), bool(block.fc.weight.isnan().all()), exported(sharded)


def test_parts_may_be_gathered_and_sent_by_hand(ranks: RankPool) -> None:
    run = Run(stage=3, steps=4)
    results = ranks.run(parts_by_hand, run, size=2)
    assert all(whole and absent_again for whole, absent_again, _ in results)
    assert_same_bits(assembled(state for _, _, state in results), assemble_run(ranks, run, size=2))


class Opaque:
    """Hides a tensor."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Opaque:
        return Opaque(self.inner(x))


def hidden(rank: Rank) -> str:
    model = nn.ModuleList([Hiding()])
    config = ds_zero.ZeroConfig(stage=3)
    ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    try:
        model[0](torch.ones(1, 2))
    except NotImplementedError as error:
        return str(error)
    return ""


def test_tensors_that_cannot_be_found_are_an_error(ranks: RankPool) -> None:
    for message in ranks.run(hidden, size=2):
        assert "unit '0' takes or returns a Opaque" in message
        assert "register_pytree_node" in message


def absent(rank: Rank) -> tuple[bool, torch.Size, str]:
    model = seeded()
    config = ds_zero.ZeroConfig(stage=3)
    ds_zero.shard(model, lambda g: torch.optim.SGD(g, lr=0.1), config=config, group=rank.group)
    weight = model.blocks[0].fc.weight
    is_nan = bool(weight.isnan().all())
    with torch.no_grad():
        weight.zero_()
    try:
        model(micro_batch(0))
    except RuntimeError as error:
        return is_nan, weight.shape, str(error)
    return is_nan, weight.shape, ""


def test_sharded_parameters_read_as_nan_and_writing_them_is_noticed(ranks: RankPool) -> None:
    for is_nan, shape, message in ranks.run(absent, size=2):
        assert is_nan
        assert shape == (128, 32)
        assert "'blocks.0.fc.weight' was changed in place while it was sharded" in message
