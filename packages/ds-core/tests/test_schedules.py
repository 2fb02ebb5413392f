"""Schedules: DeepSpeed's curves, properties of the formulas, and applying them to an optimizer."""

import json
import math
from pathlib import Path

import pytest
import torch
from ds_core.schedules import (
    SCHEDULES,
    LRRangeTest,
    NotSteppedError,
    OneCycle,
    Scheduler,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)
from hypothesis import given
from hypothesis import strategies as st

RECORDED = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())
KINDS = {kind.__name__: kind for kind in SCHEDULES}


def made(kind, params):
    return KINDS[kind](**{key: tuple(each) if isinstance(each, list) else each for key, each in params.items()})


def optimizer_of(base_lrs, kind=torch.optim.SGD):
    return kind([{"params": [torch.zeros(1)], "lr": lr} for lr in base_lrs], lr=0.1)


# DeepSpeed's numbers #


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{case['type']}-{case['params']}")
def test_values_equal_deepspeeds(case):
    schedule = made(case["type"], case["params"])
    for step, lrs, betas in zip(
        RECORDED["steps"], case["lrs"], case["betas"] or [None] * len(case["lrs"]), strict=True
    ):
        values = schedule.values(step, case["base_lrs"])
        assert all(map(close, values.lrs, lrs)), step
        if betas is not None and values.betas is not None:
            assert all(map(close, [beta1 for beta1, _ in values.betas], betas)), step
            assert {beta2 for _, beta2 in values.betas} == {0.99}


def close(ours, theirs):
    return math.isclose(ours, theirs, rel_tol=1e-12, abs_tol=0.0)


def test_every_schedule_was_recorded_over_hundreds_of_steps():
    assert {case["type"] for case in RECORDED["cases"]} == set(KINDS)
    assert RECORDED["steps"][0] == -1
    assert RECORDED["steps"][-1] > 380


# Formulas #

rates = st.floats(1e-6, 10.0)


@given(
    low=rates,
    high=rates,
    num_steps=st.integers(1, 500),
    kind=st.sampled_from(["log", "linear"]),
    step=st.integers(-1, 800),
)
def test_a_warm_up_stays_between_its_ends_and_stays_at_the_top(low, high, num_steps, kind, step):
    schedule = WarmupLR(warmup_min_lr=low, warmup_max_lr=high, warmup_num_steps=num_steps, warmup_type=kind)
    (lr,) = schedule.values(step, [0.5]).lrs
    slack = 1e-12 * max(low, high)
    assert min(low, high) - slack <= lr <= max(low, high) + slack
    if step >= max(2, num_steps):
        assert lr == pytest.approx(high, rel=1e-12)
    if step < 0:
        assert lr == low


@given(total=st.integers(1, 300), warmup=st.integers(1, 300), past=st.integers(0, 100))
def test_decays_end_at_their_floor_and_stay_there(total, warmup, past):
    step = max(total, warmup, 2) + past
    # A total shorter than the warm-up is allowed, with a warning that another test checks.
    linear = WarmupDecayLR(total_num_steps=total, warmup_num_steps=warmup, warmup_min_lr=0.125)
    cosine = WarmupCosineLR(total_num_steps=total, warmup_num_steps=warmup, cos_min_ratio=0.25)
    assert linear.values(step, [1.0]).lrs == [0.125]
    assert cosine.values(step, [1.0]).lrs == [0.25]


@given(first=st.integers(1, 200), second=st.integers(1, 200), offset=st.integers(0, 200))
def test_a_cycle_is_as_high_as_far_from_its_ends(first, second, offset):
    cycle = OneCycle(cycle_min_lr=0.0, cycle_max_lr=1.0, cycle_first_step_size=first, cycle_second_step_size=second)
    (top,) = cycle.values(first - 1, [0.1]).lrs
    assert top == 1.0
    up, down = min(offset, first), min(offset, second)
    (rising,) = cycle.values(up - 1, [0.1]).lrs
    (falling,) = cycle.values(first + second - down - 1, [0.1]).lrs
    assert rising == pytest.approx(up / first, abs=1e-15)
    assert falling == pytest.approx(down / second, abs=1e-15)


@given(stairs=st.integers(1, 20), step=st.integers(0, 400))
def test_stairs_take_only_whole_heights(stairs, step):
    cycle = OneCycle(cycle_min_lr=0.0, cycle_max_lr=1.0, cycle_first_step_size=200, cycle_first_stair_count=stairs)
    (lr,) = cycle.values(step, [0.1]).lrs
    assert lr * stairs == pytest.approx(round(lr * stairs), abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps must be a positive whole number, got 0"),
        ("WarmupDecayLR", {"total_num_steps": 9, "warmup_num_steps": -1}, "warmup_num_steps must .*, got -1"),
        ("WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 0}, "warmup_num_steps must .*, got 0"),
        (
            "LRRangeTest",
            {"lr_range_test_step_size": 0},
            "lr_range_test_step_size must be a positive .*, got 0",
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_step_size": 0},
            "cycle_first_step_size must be a positive whole number, got 0",
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_second_step_size": -1},
            "cycle_second_step_size must be >= 0, got -1",
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "decay_step_size": -5},
            "decay_step_size must be >= 0, got -5",
        ),
    ],
)
def test_bounds(kind, params, message):
    with pytest.raises(ValueError, match=message):
        made(kind, params)


def test_one_number_for_each_group_or_one_for_all():
    schedule = LRRangeTest(lr_range_test_min_lr=(0.1, 0.2))
    assert schedule.values(-1, [1.0, 1.0]).lrs == [0.1, 0.2]
    with pytest.raises(ValueError, match=r"one for each of the 3 parameter groups, got \[0.1, 0.2\]"):
        schedule.values(-1, [1.0, 1.0, 1.0])


def test_a_total_shorter_than_the_warm_up_is_said(caplog):
    WarmupCosineLR(total_num_steps=5, warmup_num_steps=10)
    assert caplog.messages == [
        "total_num_steps 5 is less than warmup_num_steps 10: the learning rate drops when the warm-up ends"
    ]


# Applying one #

CASES = [
    ("WarmupLR", {"warmup_num_steps": 5}),
    ("WarmupDecayLR", {"total_num_steps": 20, "warmup_num_steps": 5}),
    ("WarmupCosineLR", {"total_num_steps": 20, "warmup_num_steps": 5}),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 6}),
    ("LRRangeTest", {"lr_range_test_step_size": 3}),
]


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_the_initial_values_are_written_at_once_and_there_is_no_last_one(kind, params):
    optimizer = optimizer_of([0.3, 0.6], torch.optim.AdamW)
    scheduler = Scheduler(optimizer, made(kind, params))
    expected = made(kind, params).values(-1, [0.3, 0.6])
    assert [group["lr"] for group in optimizer.param_groups] == expected.lrs == scheduler.get_lr()
    with pytest.raises(NotSteppedError, match="need to call step"):
        scheduler.get_last_lr()
    with pytest.raises(AssertionError, match="need to call step"):
        scheduler.get_last_lr()


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_each_step_writes_the_formula(kind, params):
    optimizer = optimizer_of([0.3, 0.6], torch.optim.AdamW)
    schedule = made(kind, params)
    scheduler = Scheduler(optimizer, schedule)
    for step in range(30):
        scheduler.step()
        expected = schedule.values(step, [0.3, 0.6])
        assert [group["lr"] for group in optimizer.param_groups] == expected.lrs
        assert scheduler.get_last_lr() == scheduler.get_lr() == expected.lrs
        if expected.betas is not None:
            assert [group["betas"] for group in optimizer.param_groups] == expected.betas


@pytest.mark.parametrize(("kind", "params"), CASES)
@pytest.mark.parametrize("num_steps", [0, 7])
def test_a_loaded_state_goes_on_where_it_was_saved(kind, params, num_steps):
    first = Scheduler(optimizer_of([0.3]), made(kind, params))
    for _ in range(num_steps):
        first.step()
    state = json.loads(json.dumps(first.state_dict()))
    optimizer = optimizer_of([0.3])
    second = Scheduler(optimizer, made(kind, params))
    optimizer.param_groups[0]["lr"] = 99.0
    second.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == first.get_lr()
    first.step()
    second.step()
    assert second.get_last_lr() == first.get_last_lr()


def test_the_state_is_deepspeeds():
    scheduler = Scheduler(optimizer_of([0.1]), WarmupLR())
    assert scheduler.state_dict() == {"last_batch_iteration": -1}
    scheduler.step()
    assert scheduler.state_dict() == {"last_batch_iteration": 0}


@pytest.mark.parametrize(
    "state", [{}, {"last_epoch": 3}, {"last_batch_iteration": -2}, {"last_batch_iteration": 1, "x": 2}]
)
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ValueError, match="a scheduler's state is"):
        Scheduler(optimizer_of([0.1]), WarmupLR()).load_state_dict(state)


def test_groups_replaced_by_loading_the_optimizer_are_still_written():
    optimizer = optimizer_of([0.1])
    scheduler = Scheduler(optimizer, WarmupLR(warmup_num_steps=2, warmup_max_lr=1.0))
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_learning_rate_in_a_tensor_stays_that_tensor():
    lr = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr)
    scheduler = Scheduler(optimizer, WarmupLR(warmup_num_steps=2, warmup_type="linear"))
    for expected in (0.0, 0.25, 0.5):
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr.item() == expected


def test_momentum_without_betas_is_said_once_and_left_alone(caplog):
    optimizer = optimizer_of([0.1])
    before = set(optimizer.param_groups[0])
    scheduler = Scheduler(optimizer, OneCycle(cycle_min_lr=0.1, cycle_max_lr=1.0))
    scheduler.step()
    assert caplog.messages == [
        "'OneCycle' cycles momentum, but SGD has no 'betas': only the learning rate will change; "
        "set cycle_momentum to false to say so"
    ]
    assert set(optimizer.param_groups[0]) == before
