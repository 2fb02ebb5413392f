"""Costs measured in the steps of a pipeline, and schedules made for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from ds_pipe import Costs, Pipeline, Schedule, make_schedule, pipeline, simulate
from ds_pipe.build import halved
from ds_pipe.instruction import Op
from ds_pipe.link import Link
from ds_pipe.replanning import Replanning
from ds_pipe.times import Times, _assembled, _Found
from ds_testkit import Rank, RankPool
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

MICRO_BATCHES = 4


class Clock:
    """Stands still but for what layers say they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, advance: Callable[[], None]) -> Tensor:
        ctx.advance = advance
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.advance()
        return grads[0], None


class Timed(nn.Module):
    def __init__(self, clock: Clock, forward: float, input_grad: float, weight_grad: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: clock.advance(weight_grad))
        self.clock, self.seconds, self.input_grad = clock, forward, input_grad

    def forward(self, given: Tensor) -> Tensor:
        self.clock.advance(self.seconds)
        return Passing.apply(self.linear(given), lambda: self.clock.advance(self.input_grad))


def test_operations_are_timed_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pipeline, "time", clock)
    plain = make_schedule("looped_bfs", num_ranks=1, num_micro_batches=MICRO_BATCHES)
    stages = {0: Timed(clock, 1.0, 2.0, 4.0), 1: Timed(clock, 8.0, 16.0, 32.0)}
    batches = [torch.ones(3, 4, requires_grad=True)] * MICRO_BATCHES
    times = Times()
    whole, split = (Pipeline(each, stages, None, loss=lambda out, _: out.sum()) for each in (plain, halved(plain)))
    with pytest.raises(ValueError, match=r"no step of the stages \[0, 1\] was timed: pass times="):
        whole.costs(times)
    whole.run(batches, batches, times=times)
    costs = whole.costs(times)
    assert (costs.forward, costs.input_grad, costs.weight_grad) == ((1.0, 8.0), (3.0, 24.0), (3.0, 24.0))
    split.run(batches, batches, times=times)
    costs = split.costs(times)
    assert (costs.forward, costs.input_grad, costs.weight_grad) == ((1.0, 8.0), (2.0, 16.0), (4.0, 32.0))
    assert costs.backward == (6.0, 48.0)
    assert costs.kept_bytes == (48.0, 48.0)  # the input of the linear layer
    assert times.computing == 2 * MICRO_BATCHES * (7.0 + 56.0)


@given(ahead=st.floats(-1e6, 1e6), there=st.floats(0.5, 2.0), back=st.floats(0.5, 2.0))
def test_clocks_of_two_hosts_may_differ(ahead: float, there: float, back: float) -> None:
    seconds = {op.value: {0: 1.0} for op in (Op.F, Op.B)} | {op.value: {} for op in (Op.I, Op.W, Op.UNSHARD)}
    rows = [_Found(seconds, {"x1": 100}, {0: 1.0}, trips) for trips in ({1: back - ahead}, {0: there + ahead})]
    costs = _assembled(rows, 1, Link(0.001, 1000.0))
    assert costs.latency == pytest.approx((there + back) / 2 - 0.1, abs=1e-6)
    assert _assembled([rows[0], rows[1]._replace(trips={})], 1, Link(0.25, 1000.0)).latency == 0.25  # idle


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(32, 32), seconds

    def forward(self, given: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.linear(given)


class Measured(NamedTuple):
    costs: Costs
    before: Costs


def measure(rank: Rank, schedule: Schedule) -> Measured:
    torch.manual_seed(rank.rank)
    made = Pipeline(schedule, {rank.rank: Slow((0.3, 0.0)[rank.rank])}, rank.group, loss=functional.mse_loss)
    batches = [torch.randn(16, 32) for _ in range(MICRO_BATCHES)]
    times = Times()
    made.run(batches, batches, times=times)
    first = made.costs(times)
    made.run(batches, batches, times=times)
    return Measured(made.costs(times), first)


@pytest.mark.rung_c
def test_all_ranks_have_the_same_costs_without_waiting(ranks: RankPool) -> None:
    schedule = make_schedule("zb_h1", num_ranks=2, num_micro_batches=MICRO_BATCHES)
    first, second = ranks.run(measure, schedule, size=2)
    assert first == second
    costs = first.costs
    assert costs.message_bytes == (0.0, 4.0 * 16 * 32)
    assert costs.kept_bytes[0] == 4.0 * 16 * 32
    assert costs.forward[0] > 0.3
    assert costs.forward[1] < costs.forward[0]  # it waits 0.3 s for each input, and sleeps no more
    assert costs.latency > 0
    assert costs.bytes_per_second > 0
    assert simulate(schedule, costs).seconds > MICRO_BATCHES * 0.3


class Fake:
    """Stands for a pipeline whose costs are known."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule = schedule
        self._costs = costs

    def costs(self, _times: Times) -> Costs:
        return self._costs


def test_the_schedule_changes_after_the_first_steps(caplog: pytest.LogCaptureFixture) -> None:
    costs = Costs.uniform(2, latency=0.5)
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=4)
    made = Replanning(schedule, lambda each: Fake(each, Costs.uniform(9)), 4, agree=lambda _: costs)  # type: ignore[arg-type, return-value]  # a fake
    with caplog.at_level(logging.INFO, logger="ds_pipe"):
        steps = [made.next() for _ in range(6)]
    assert [step.pipeline.schedule.name for step in steps] == ["1f1b", "1f1b:halved", "1f1b", "1f1b:halved"] + 2 * [
        "greedy"
    ]
    assert [step.times is None for step in steps] == [True, False, False, False, True, True]
    found = steps[-1].pipeline.schedule
    assert simulate(found, costs).seconds < simulate(schedule, costs).seconds
    assert found.placement == schedule.placement
    assert "it takes over" in caplog.text


def test_a_schedule_that_is_best_stays(caplog: pytest.LogCaptureFixture) -> None:
    costs = Costs.uniform(1)
    schedule = make_schedule("1f1b", num_ranks=1, num_micro_batches=2)
    made = Replanning(schedule, lambda each: Fake(each, costs), 3, agree=lambda each: each)  # type: ignore[arg-type, return-value]  # a fake
    with caplog.at_level(logging.INFO, logger="ds_pipe"):
        steps = [made.next() for _ in range(5)]
    assert steps[-1].pipeline.schedule == schedule
    assert "nothing changes" in caplog.text
    with pytest.raises(ValueError, match="replan after at least 3 steps; got 2"):
        Replanning(schedule, lambda each: Fake(each, costs), 2, agree=lambda each: each)  # type: ignore[arg-type, return-value]  # a fake
