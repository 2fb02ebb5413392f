"""State of the optimizers: saved on some ranks, loaded on others; groups, closures, missing and bad gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ds_comm.codecs import BlockCodec
from ds_comm.optim import CompressedAdam, Link, LocalSteps, OneBitAdam, OneBitLamb, ZeroOneAdam
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

from . import training

ADAPTIVE = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam", "CompressedAdam")


def begin(rank: Rank, name: str, saved: Any = None, **settings: Any) -> tuple[list[nn.Parameter], Any]:
    params = training.parameters()
    optimizer = training.make(name, params, Link(group=rank.group), **settings)
    if saved is not None:
        with torch.no_grad():
            for param, value in zip(params, saved[0], strict=True):
                param.copy_(value)
        optimizer.load_state_dict(saved[1])
    return params, optimizer


def go_on(rank: Rank, name: str, steps: list[int], saved: Any = None) -> tuple[list[Tensor], dict[str, Any]]:
    params, optimizer = begin(rank, name, saved)
    for step in steps:
        training.set_gradients(params, rank.rank, step)
        optimizer.step()
    return [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict())


@pytest.mark.rung_c
@pytest.mark.parametrize("name", training.CODES)
def test_saved_on_four_ranks_goes_on_on_two(ranks: RankPool, name: str) -> None:
    saved = ranks.run(go_on, name, list(range(1, 13)))
    for params, state in saved[1:]:
        assert state["param_groups"] == saved[0][1]["param_groups"]
        for index, entries in state["state"].items():
            assert entries.keys() == saved[0][1]["state"][index].keys()
            for key, value in entries.items():
                torch.testing.assert_close(value, saved[0][1]["state"][index][key], rtol=0, atol=0)
        assert all(map(torch.equal, params, saved[0][0]))
    assert any(entries["error"].norm() > 0.01 for entries in saved[0][1]["state"].values())
    reloaded = ranks.run(go_on, name, [], saved[0], size=2)
    for _, state in reloaded:
        for index, entries in state["state"].items():
            for key, value in entries.items():
                torch.testing.assert_close(value, saved[0][1]["state"][index][key], rtol=0, atol=0)
    more = ranks.run(go_on, name, list(range(13, 25)), saved[0], size=2)
    assert all(map(torch.equal, more[0][0], more[1][0]))
    assert all(bool(param.isfinite().all()) for param in more[0][0])


def sent_and_residual(rank: Rank, saved: Any, steps: list[int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Int4 gradients through SGD: what parameters moved is what was sent."""
    params = [nn.Parameter(torch.zeros(300))]
    codec = BlockCodec(code="sign", block=64)
    optimizer = LocalSteps(
        torch.optim.SGD(params, lr=1.0), every=1, lr=1.0, momentum=0.0, codec=codec, link=Link(group=rank.group)
    )
    if saved is not None:
        optimizer.load_state_dict(saved)
    for step in steps:
        params[0].grad = training.noise(rank.rank, step)[:300]
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    return -params[0].detach(), state["state"][0]["error"], state


@pytest.mark.rung_c
def test_what_was_sent_and_is_still_owed_survives_four_to_two_ranks(ranks: RankPool) -> None:
    first, second = list(range(6)), list(range(6, 12))
    before = ranks.run(sent_and_residual, None, first)
    after = ranks.run(sent_and_residual, before[0][2], second, size=2)
    true = sum(training.noise(rank, step)[:300].double() for rank in range(4) for step in first) / 4
    true = true + sum(training.noise(rank, step)[:300].double() for rank in range(2) for step in second) / 2
    got = before[0][0].double() + after[0][0].double() + after[0][1].double()
    torch.testing.assert_close(got, true, rtol=0, atol=1e-4)
    assert after[0][1].norm() > 1


@pytest.mark.rung_c
def test_alone_a_checkpoint_changes_nothing(ranks: RankPool) -> None:
    for name in training.CODES:
        steps = list(range(1, 25))
        whole = ranks.run(go_on, name, steps, size=1)[0]
        half = ranks.run(go_on, name, steps[:12], size=1)[0]
        rest = ranks.run(go_on, name, steps[12:], half, size=1)[0]
        for got, wanted in zip(rest[0], whole[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6, msg=name)


def with_a_bad_gradient(rank: Rank, name: str, mode: str) -> tuple[list[str], list[Tensor], list[Tensor], int]:
    params = training.parameters()
    optimizer = training.make(name, params, Link(group=rank.group, on_nonfinite=mode))
    raised, seen, errors = [], [], []
    for step in range(1, 17):
        training.set_gradients(params, rank.rank, step)
        if step in {3, 13} and rank.rank == 1:
            params[1].grad[5] = float("nan")
        try:
            optimizer.step()
        except FloatingPointError as error:
            raised.append(str(error))
        seen.append(training.flat(params))
    if name in {"ZeroOneAdam", "LocalSteps"}:
        optimizer.synchronize()
    state = optimizer.state_dict()["state"]
    errors = [entry["error"] for entry in state.values()]
    return raised, seen, errors, optimizer.skipped_steps


@pytest.mark.rung_c
@pytest.mark.parametrize("mode", ["raise", "skip"])
@pytest.mark.parametrize("name", training.CODES)
def test_a_gradient_that_is_not_finite_poisons_nothing(ranks: RankPool, name: str, mode: str) -> None:
    results = ranks.run(with_a_bad_gradient, name, mode, size=3)
    for raised, seen, errors, skipped in results:
        assert skipped == 2
        assert len(raised) == (2 if mode == "raise" else 0)
        assert all(bool(each.isfinite().all()) for each in (*errors, seen[-1]))
        if name in {"OneBitAdam", "OneBitLamb", "CompressedAdam"}:
            assert torch.equal(seen[2], seen[1])
            assert torch.equal(seen[12], seen[11])
            assert not torch.equal(seen[13], seen[12])
    if mode == "raise" and name in ADAPTIVE:
        assert "on rank 1 of 3 not finite: parameter 1, shape (37,)" in results[1][0][0]
        assert "none here, but on another" in results[0][0][0]


def round_taken_back(rank: Rank) -> tuple[Tensor, Tensor]:
    params = training.parameters()
    optimizer = training.make("LocalSteps", params, Link(group=rank.group, on_nonfinite="skip"))
    for step in range(1, 7):
        if step == 4:
            before = training.flat(params)
        training.set_gradients(params, rank.rank, step)
        if step == 4 and rank.rank == 0:
            params[0].grad.fill_(float("inf"))
        optimizer.step()
    return before, training.flat(params)


@pytest.mark.rung_c
def test_a_round_with_a_bad_gradient_is_taken_back_everywhere(ranks: RankPool) -> None:
    for before, after in ranks.run(round_taken_back, size=2):
        assert torch.equal(before, after)


def within_a_round(rank: Rank) -> tuple[str, Tensor]:
    params, optimizer = begin(rank, "LocalSteps")
    training.set_gradients(params, rank.rank, 1)
    optimizer.step()
    with pytest.raises(RuntimeError) as caught:
        optimizer.state_dict()
    optimizer.synchronize()
    optimizer.state_dict()
    return str(caught.value), training.flat(params)


@pytest.mark.rung_c
def test_states_are_saved_between_rounds(ranks: RankPool) -> None:
    (text, first), (_, second) = ranks.run(within_a_round, size=2)
    assert "got a call after 1 steps of a round: call synchronize()" in text
    assert torch.equal(first, second)


def from_different_places(rank: Rank) -> Tensor:
    param = nn.Parameter(torch.full((3,), float(rank.rank)))
    CompressedAdam([param], link=Link(group=rank.group))
    return param.detach()


@pytest.mark.rung_c
def test_parameters_begin_as_those_of_the_first_rank(ranks: RankPool) -> None:
    assert all(torch.equal(each, torch.zeros(3)) for each in ranks.run(from_different_places))


def with_missing_gradients(rank: Rank, name: str) -> list[Tensor]:
    params = training.parameters()
    params[2].requires_grad_(False)
    optimizer = training.make(name, params, Link(group=rank.group))
    for step in range(1, 13):
        training.set_gradients(params, rank.rank, step)
        params[2].grad = None
        if rank.rank == 0:
            params[1].grad = None
        optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.mark.rung_c
@pytest.mark.parametrize("name", training.CODES)
def test_missing_gradients_count_as_zero_and_frozen_parameters_stay(ranks: RankPool, name: str) -> None:
    results = ranks.run(with_missing_gradients, name, size=2)
    for params in results:
        assert torch.equal(params[2], training.start()[2])
        assert not torch.equal(params[1], training.start()[1])
        assert all(map(torch.equal, params, results[0]))


# One rank #


@pytest.mark.parametrize("name", training.CODES)
def test_closures_and_bfloat16(name: str) -> None:
    param = nn.Parameter(torch.linspace(-2, 2, 40).bfloat16())
    link, codec = Link(), BlockCodec(code="int8")
    made: dict[str, Callable[[], Any]] = {
        "OneBitAdam": lambda: OneBitAdam([param], 0.05, freeze_step=10, codec=codec, link=link),
        "OneBitLamb": lambda: OneBitLamb([param], 0.05, freeze_step=10, codec=codec, link=link),
        "ZeroOneAdam": lambda: ZeroOneAdam([param], 0.05, var_freeze_step=10, codec=codec, link=link),
        "CompressedAdam": lambda: CompressedAdam([param], 0.05, codec=codec, link=link),
        "LocalSteps": lambda: LocalSteps(torch.optim.SGD([param], 0.05), every=2, codec=codec, link=link),
    }
    optimizer = made[name]()

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.float().square().sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    optimizer.synchronize() if name in {"ZeroOneAdam", "LocalSteps"} else None
    state = copy.deepcopy(optimizer.state_dict())
    again = made[name]()
    again.load_state_dict(state)
    for key, value in again.state_dict()["state"][0].items():
        assert not isinstance(value, Tensor) or value.dtype == torch.float32
        torch.testing.assert_close(value, state["state"][0][key], rtol=0, atol=0)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    for name in training.CODES:
        params = training.parameters()
        optimizer = training.make(name, params, Link())
        (optimizer.inner if name == "LocalSteps" else optimizer).param_groups[0]["lr"] = 0.0
        for step in range(1, 25):
            training.set_gradients(params, 0, step)
            optimizer.step()
        assert torch.equal(params[0].detach(), training.start()[0]), name
        assert bool(training.flat(params).isfinite().all()), name


PARAM = nn.Parameter(torch.zeros(2))


def stepped_then_added() -> None:
    optimizer = CompressedAdam([nn.Parameter(torch.ones(2))])
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: OneBitAdam([PARAM], lr=-1.0), ValueError, "lr must not be negative; got -1.0"),
        (lambda: OneBitAdam([PARAM], betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be .*got 1.0"),
        (lambda: OneBitAdam([{"params": [PARAM], "eps": -1}]), ValueError, "eps must not be negative; got -1"),
        (lambda: OneBitAdam([PARAM], freeze_step=0), ValueError, "freeze_step must be at least 1.*got 0"),
        (lambda: OneBitLamb([PARAM], freeze_step=0), ValueError, "freeze_step must be at least 1.*got 0"),
        (lambda: OneBitLamb([PARAM], min_coeff=3, max_coeff=2), ValueError, "coeff .* got 3 and 2"),
        (lambda: ZeroOneAdam([PARAM], var_update_scaler=0), ValueError, "var_update_scaler must be at least 1; got 0"),
        (lambda: LocalSteps(torch.optim.SGD([PARAM]), every=0), ValueError, "every must be at least 1.*got 0"),
        (lambda: LocalSteps(torch.optim.SGD([PARAM]), every=1, momentum=1.0), ValueError, "momentum must .*got 1.0"),
        (lambda: Link(on_nonfinite="ignore"), ValueError, "one of raise, skip; got 'ignore'"),
        (lambda: Link(exact_dtype=torch.float16), ValueError, "torch.bfloat16; got torch.float16"),
        (
            lambda: CompressedAdam([torch.zeros(2, dtype=torch.int64)]).step(),
            ValueError,
            "dense floating-point tensors on one device, cpu; got torch.int64",
        ),
        (
            lambda: CompressedAdam([torch.zeros(()).expand(2, 3)]),
            ValueError,
            r"got strides \(0, 0\).*without ds-zero",
        ),
        (stepped_then_added, RuntimeError, "added before the first step.*after 1 steps"),
    ],
)
def test_errors_say_what_was_got(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
