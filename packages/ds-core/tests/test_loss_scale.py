"""Static and dynamic loss scale: DeepSpeed's traces, and properties of the update."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from ds_core.config import Fp16
from ds_core.loss_scale import LossScale, init, update
from hypothesis import given
from hypothesis import strategies as st

RECORDED = json.loads((Path(__file__).parent / "data" / "loss_scales.json").read_text())


def fp16_of(case):
    return Fp16(
        enabled=True,
        initial_scale_power=case["power"],
        loss_scale_window=case["window"],
        hysteresis=case["hysteresis"],
        consecutive_hysteresis=case["consecutive"],
        min_loss_scale=case["min_scale"],
    )


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str({key: case[key] for key in list(case)[:6]}))
def test_scales_equal_deepspeeds(case):
    state = init(fp16_of(case))
    scales = []
    for overflow in case["overflows"][: len(case["scales"])]:
        state = update(state, overflow == "1")
        scales.append(state.scale)
    assert scales == case["scales"]
    if len(scales) < len(case["overflows"]):
        # There DeepSpeed gave up.
        assert case["overflows"][len(scales)] == "1"
        with pytest.raises(RuntimeError, match="overflow at the smallest loss scale"):
            update(state, True)


def test_the_traces_hold_growth_and_the_end():
    assert any(max(case["scales"]) > 2 ** case["power"] for case in RECORDED)
    assert any(len(case["scales"]) < len(case["overflows"]) for case in RECORDED)


configs = st.builds(
    Fp16,
    enabled=st.just(True),
    initial_scale_power=st.integers(4, 16),
    loss_scale_window=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
    consecutive_hysteresis=st.booleans(),
    min_loss_scale=st.integers(1, 16),
)
histories = st.lists(st.booleans(), max_size=60)


def run(state, history):
    """Return the states until the end, or until nothing is left to lower."""
    states = [state]
    for overflow in history:
        try:
            states.append(update(states[-1], overflow))
        except RuntimeError:
            assert overflow
            assert states[-1].scale == states[-1].min_scale
            break
    return states


@given(config=configs, history=histories)
def test_the_scale_changes_by_two_and_never_falls_below_the_minimum(config, history):
    states = run(init(config), history)
    for before, after in pairwise(states):
        assert after.scale in (before.scale, before.scale * 2, max(before.scale / 2, config.min_loss_scale))
        assert after.scale >= config.min_loss_scale
        assert 1 <= after.hysteresis <= config.hysteresis


@given(config=configs, history=histories)
def test_an_overflow_never_raises_and_a_success_never_lowers_the_scale(config, history):
    states = run(init(config), history)
    for before, after, overflow in zip(states, states[1:], history):
        assert after.scale <= before.scale if overflow else after.scale >= before.scale


@given(config=configs, history=histories)
def test_a_state_survives_json(config, history):
    state = run(init(config), history)[-1]
    assert LossScale(**json.loads(json.dumps(state._asdict()))) == state


@given(config=configs)
def test_a_full_window_without_overflow_doubles_the_scale(config):
    state = init(config)
    for _ in range(config.loss_scale_window):
        assert state.scale == 2.0**config.initial_scale_power
        state = update(state, False)
    state = update(state, False)
    assert state.scale == 2.0 ** (config.initial_scale_power + 1)


def test_it_takes_the_hysteresis_to_lower_the_scale():
    state = init(Fp16(enabled=True, hysteresis=3))
    scales = []
    for _ in range(4):
        state = update(state, True)
        scales.append(state.scale)
    assert scales == [65536, 65536, 32768, 16384]


def test_consecutive_hysteresis_is_restored_by_one_success():
    once = Fp16(enabled=True, hysteresis=2)
    each = Fp16(enabled=True, hysteresis=2, consecutive_hysteresis=True)
    for config, expected in ((once, 32768), (each, 65536)):
        state = init(config)
        for overflow in (True, False, True):
            state = update(state, overflow)
        assert state.scale == expected


@given(history=histories)
def test_a_static_scale_never_changes(history):
    for state in (init(Fp16(enabled=True, loss_scale=128)), init(Fp16()), init(None)):
        assert set(run(state, history)) == {state}


def test_what_a_run_starts_with():
    assert init(Fp16(enabled=True, loss_scale=128)).scale == 128
    assert init(Fp16(enabled=False, loss_scale=128)).scale == 1
    assert init(None).scale == 1
    assert init(Fp16(enabled=True)).scale == 2**16


def test_the_end_says_what_to_do():
    state = init(Fp16(enabled=True, initial_scale_power=1, min_loss_scale=2, hysteresis=1))
    with pytest.raises(RuntimeError, match=r"fp16.min_loss_scale = 2, after 1 steps; .* train in bf16, or lower"):
        update(state, True)
