"""Single parameters, gradients and optimizer state, read and written at every stage as on one rank."""

from __future__ import annotations

from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_testkit.state import assembled, assert_same_bits, exported
from ds_zero.parking import KINDS, park, states_of, unpark
from torch import Tensor

from .helpers import Run, build, make_optimizer, train_steps
from .optimizers import Shampoo

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


def gone(rank: Rank, run: Run) -> str:
    """Run the model within the block: what it gathered is partitioned again before the block ends."""
    model, sharded = build(rank, run)
    before = dict(sharded.access.stream())

    def change_and_run() -> None:
        with sharded.access.gathered(model.norm, writeback_from=0):
            model.norm.weight.data.add_(1.0)
            model(torch.full((2, 5), 1))

    with pytest.raises(RuntimeError, match=r"norm: partitioned again within gathered\(\)") as caught:
        change_and_run()
    for name, value in sharded.access.stream():
        assert torch.equal(value, before[name]), name
    return str(caught.value)


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_gone_from_a_block_is_an_error_on_all_ranks(ranks: RankPool, compute: torch.dtype | None) -> None:
    texts = ranks.run(gone, Run(compute=compute, model={"tied": True}), size=2)
    assert texts[0] == texts[1]


def touched(rank: Rank, run: Run) -> None:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(1))
    before = sharded.access.full_param("head.weight")
    assert not torch.equal(before, before.bfloat16().float())
    with sharded.access.gathered(model.head, writeback_from=0), torch.no_grad():
        model.head.weight[0] = 2.0
    after = sharded.access.full_param("head.weight")
    assert torch.equal(after[1:], before[1:])
    assert (after[0] == 2.0).all()


@pytest.mark.parametrize("stage", range(4))
def test_masters_of_elements_that_a_block_left_alone_stay(ranks: RankPool, stage: int) -> None:
    ranks.run(touched, Run(stage=stage, compute=torch.bfloat16), size=2)


def disagreeing(rank: Rank, run: Run) -> None:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(1))
    access, before = sharded.access, sharded.access.full_param("norm.weight")
    value = torch.full_like(before, float(rank.rank))
    model(torch.full((2, 5), 1)).backward()
    for change in (
        lambda: access.set_full_param("norm.weight", value),
        lambda: access.set_full_grad("norm.weight", value),
        lambda: access.set_full_state("norm.weight", "exp_avg", value),
    ):
        with pytest.raises(ValueError, match="the ranks got different values for the whole of it; nothing was changed"):
            change()
    assert torch.equal(access.full_param("norm.weight"), before)
    with pytest.raises(ValueError, match=r"no parameter 'norm.wieght'; it has .*\bnorm.weight"):
        access.full_param("norm.wieght")


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_values_that_differ_between_ranks_are_refused(ranks: RankPool, stage: int) -> None:
    ranks.run(disagreeing, Run(stage=stage), size=2)


def gathered(rank: Rank, run: Run, writer: int) -> Any:
    """Change two of three parameters on one rank; the third keeps its exact master."""
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(2))
    with sharded.access.gathered([model.tokens.weight, "head.weight", "norm.weight"], writeback_from=writer):
        seen = model.norm.weight.detach().clone()
        if rank.rank == writer:
            model.tokens.weight.data[0] = 3.0  # not seen by a version
            with torch.no_grad():
                model.head.weight.mul_(2)
    with sharded.access.gathered(model.blocks[0]):
        whole = sharded.module.blocks[0].fc.weight.detach().float().clone()
    kept = torch.equal(seen.float(), sharded.access.full_param("norm.weight").to(seen.dtype).float())
    assert torch.equal(whole, sharded.access.full_param("blocks.0.fc.weight").to(run.compute or torch.float32).float())
    train_steps(rank, run, model, sharded, range(2, 3))
    return exported(sharded), kept


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_one_rank_changes_becomes_everybodys(ranks: RankPool, compute: torch.dtype | None) -> None:
    run = Run(compute=compute)
    want = assembled([ranks.run(gathered, run._replace(stage=0), 0, size=1)[0][0]])
    for size, stage, writer in ((2, 0, 1), (2, 1, 0), (4, 2, 3), (4, 3, 2), (2, 3, 0)):
        results = ranks.run(gathered, run._replace(stage=stage), writer, size=size)
        assert_same_bits(assembled(pieces for pieces, _ in results), want)
        assert all(kept for _, kept in results)


def refused(rank: Rank, stage: int) -> tuple[list[str], bool, bool]:
    model, sharded = build(rank, Run(stage=stage))
    before, texts = assembled([exported(sharded)]) if rank.size == 1 else exported(sharded), []

    def change(what: Any, writer: int | None, *, fails: bool = False) -> None:
        with sharded.access.gathered(what, writeback_from=writer):
            if rank.rank == 1 or fails:
                torch.nn.init.ones_(model.norm.bias)
            if fails:
                raise ZeroDivisionError

    for writer in (None, 0):
        with pytest.raises(RuntimeError) as error:
            change(model, writer)
        texts.append(str(error.value))
    with pytest.raises(ZeroDivisionError):
        change("norm.bias", 1, fails=True)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        change("norm.bias", 2)
    after = exported(sharded)
    unchanged = all(torch.equal(old.data, new.data) for old, new in zip(before, after, strict=True))
    with sharded.access.gathered("norm.bias"):
        zero = bool((model.norm.bias == 0).all())
    return texts, unchanged, zero


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_other_changes_are_undone_and_said_on_all_ranks(ranks: RankPool, stage: int) -> None:
    for texts, unchanged, zero in ranks.run(refused, stage, size=2):
        assert texts[0].startswith("norm.bias: changed within gathered(), where no rank may change parameters")
        assert "only the rank of writeback_from may" in texts[1]
        assert unchanged
        assert zero


def moved(rank: Rank, stage: int) -> tuple[Any, Any, dict[str, int]]:
    """Park every storage by hand, as on a GPU, in the middle of training."""
    run = Run(stage=stage, compute=torch.bfloat16)
    model = seeded()
    config = ds_zero.ZeroConfig(stage=stage, host_memory=False)  # memory that ranks share has a fixed size
    precision = ds_zero.Precision(compute=torch.bfloat16)
    sharded = ds_zero.shard(model, make_optimizer("AdamW"), config=config, group=rank.group, precision=precision)
    train_steps(rank, run, model, sharded, range(2))
    freed = sharded.parking.offload_states()
    sharded._release()
    tensors = [tensor for of_kind in states_of(sharded._flats, sharded.optimizer).values() for tensor in of_kind]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    parked = [park(storage) for storage in storages.values() if storage.nbytes()]
    assert sum(storage.nbytes() for storage in storages.values()) == 0
    report = sharded.memory()
    held = sum(one.host.numel() for one in parked)
    assert held >= report.param + report.grad + report.state
    for one in parked:
        unpark(one)
    train_steps(rank, run, model, sharded, range(2, 4))
    return exported(sharded), None, freed


def trained(rank: Rank, stage: int) -> Any:
    run = Run(stage=stage, compute=torch.bfloat16)
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(4))
    return exported(sharded)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_parked_state_comes_back_as_it_was(ranks: RankPool, stage: int) -> None:
    results = ranks.run(moved, stage, size=2)
    assert_same_bits(assembled(part[0] for part in results), assembled(ranks.run(trained, stage, size=2)))
    assert all(freed == dict.fromkeys(KINDS, 0) for _, _, freed in results)  # on a CPU nothing is to be gained


def test_unknown_states_are_refused() -> None:
    parking = ds_zero.shard(torch.nn.Linear(2, 2), None).parking
    with pytest.raises(ValueError, match="no states 'hp_params'; there are params, masters, optimizer, gradients"):
        parking.offload_states(["hp_params"])
    assert parking.reload_states() == 0


def test_states_named_twice_are_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = ds_zero.shard(torch.nn.Linear(2, 2), torch.optim.SGD, precision=ds_zero.Precision(compute=torch.bfloat16))
    before = sharded.access.full_param("weight")
    monkeypatch.setattr("ds_zero.parking._is_on_host", lambda storage: False)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    freed = sharded.parking.offload_states(["masters", "params", "masters"])
    assert list(freed) == ["masters", "params"]
    assert freed["masters"] == 2 * freed["params"] > 0
    assert sharded.parking.reload_states() == sum(freed.values())
    assert torch.equal(sharded.access.full_param("weight"), before)


def misfits(rank: Rank, stage: int) -> tuple[list[str], bool]:
    """Give rank 0 alone values that do not fit."""
    model, sharded = build(rank, Run(stage=stage))
    model(torch.full((2, 5), rank.rank)).backward()
    access, texts = sharded.access, []
    before = [access.full_param("norm.weight"), access.full_grad("norm.weight")]
    longer = int(rank.rank == 0)
    part = torch.ones(access.local_param("norm.weight").data.numel() + longer)
    whole = torch.ones(before[0].numel() + longer)

    def in_a_block() -> None:
        with access.gathered(["head.weight", "norm.weight"], writeback_from=0):
            if rank.rank == 0:
                model.norm.weight.data = whole

    for action in (
        lambda: access.set_local_param("norm.weight", part),
        lambda: access.set_local_grad("norm.weight", part),
        lambda: access.set_full_param("norm.weight", whole),
        lambda: access.set_full_grad("norm.weight", whole),
        in_a_block,
    ):
        with pytest.raises(ValueError) as error:
            action()
        texts.append(str(error.value))
    after = [access.full_param("norm.weight"), access.full_grad("norm.weight")]
    return texts, all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_what_does_not_fit_on_one_rank_is_said_on_all(ranks: RankPool, stage: int) -> None:
    (first, first_kept), (second, second_kept) = ranks.run(misfits, stage, size=2)
    assert first_kept
    assert second_kept
    assert all("got a value of shape" in text for text in first[:4])
    assert all("another rank got a value of a shape that does not fit" in text for text in second[:4])
    assert first[4] == second[4]
    assert first[4].startswith("norm.weight: given data of another shape within gathered() on some rank")


def test_what_is_away_is_neither_stepped_nor_saved_nor_read() -> None:
    model = torch.nn.Linear(2, 2)
    sharded = ds_zero.shard(model, torch.optim.Adam)
    model(torch.ones(1, 2)).sum().backward()
    sharded.parking.away = True  # on a CPU nothing is ever moved
    for action in (
        sharded.step,
        sharded.grad_norm,
        sharded.state,
        lambda: sharded.load_state(None),
        lambda: sharded.access.full_param("weight"),
        lambda: list(sharded.access.stream()),
        lambda: sharded.access.gathered("weight").__enter__(),
        sharded.parking.offload_states,
    ):
        with pytest.raises(RuntimeError, match=r"in host memory: call reload_states\(\) first"):
            action()
    sharded.parking.reload_states()
    sharded.step()


def whole_moved(rank: Rank, parks: bool) -> tuple[Any, bool]:
    """Park what an optimizer of whole tensors keeps: copies of parameters, lists of factors."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    config = ds_zero.ZeroConfig(stage=2, host_memory=False)
    sharded = ds_zero.shard(model, Shampoo, config=config, group=rank.group)
    gone = True
    for _ in range(2):
        model(torch.ones(2, 12)).square().sum().backward()
        sharded.step()
        if parks:
            tensors = [each for of_kind in states_of(sharded._flats, sharded.optimizer).values() for each in of_kind]
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
            parked = [park(storage) for storage in storages.values() if storage.nbytes()]
            kept = [param for group in sharded.optimizer.param_groups for param in group["params"]]
            kept += [factor for entry in sharded.optimizer.state.values() for factor in entry["factors"]]
            gone = gone and len(kept) > 0 and all(not tensor.untyped_storage().nbytes() for tensor in kept)
            for one in parked:
                unpark(one)
    return exported(sharded), gone


def test_state_of_whole_tensors_is_parked_too(ranks: RankPool) -> None:
    results = ranks.run(whole_moved, True, size=2)
    assert all(gone for _, gone in results)
    want = assembled(pieces for pieces, _ in ranks.run(whole_moved, False, size=2))
    assert_same_bits(assembled(pieces for pieces, _ in results), want)
