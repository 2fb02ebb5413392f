"""Which micro-batches make up an optimizer step, whatever happens between two of them."""

from __future__ import annotations

import pytest
import torch
from ds_core.engine import Engine
from ds_core.loss_scale import LossScale

from .plain import INF, Probe, engine_of


def backward(engine: Engine, gradient: float) -> None:
    engine.backward(engine(torch.tensor(gradient)))


def run(engine: Engine, *gradients: float) -> list[bool]:
    boundaries = []
    for gradient in gradients:
        backward(engine, gradient)
        boundaries.append(engine.step().boundary)
    return boundaries


def test_a_resume_with_another_accumulation_makes_whole_steps(tmp_path):
    engine, _ = engine_of(Probe(), accumulation=3)
    run(engine, *[1.0] * 3)
    engine.save_checkpoint(tmp_path)
    resumed, _ = engine_of(Probe(), accumulation=2)
    resumed.load_checkpoint(tmp_path)
    assert run(resumed, *[1.0] * 4) == [False, True, False, True]


def test_a_checkpoint_loaded_within_a_step_starts_a_new_one(tmp_path):
    model = Probe()
    engine, _ = engine_of(model, accumulation=2)
    run(engine, 0.0, 0.0)
    engine.save_checkpoint(tmp_path, "a")
    run(engine, 100.0)
    engine.load_checkpoint(tmp_path)
    assert run(engine, 1.0, 3.0) == [False, True]
    assert model.weight.item() == pytest.approx(-0.2)
    engine.save_checkpoint(tmp_path, "b")


def test_a_checkpoint_loaded_within_a_step_draws_the_same_numbers(tmp_path):
    model = Probe()
    engine, _ = engine_of(model, accumulation=1)
    engine.save_checkpoint(tmp_path)
    engine(torch.tensor(1.0))
    engine.load_checkpoint(tmp_path)
    engine(torch.tensor(1.0))
    assert model.drawn[0] == model.drawn[1]


def test_a_second_backward_pass_of_a_micro_batch_is_refused():
    model = Probe()
    engine, sharded = engine_of(model, accumulation=2)
    for gradient in (1.0, 3.0):
        backward(engine, gradient)
        with pytest.raises(
            RuntimeError, match=r"a second time for one micro-batch: add its losses up .* then step\(\)"
        ):
            backward(engine, 100.0)
        outcome = engine.step()
    assert (outcome.grad_norm, sharded.micro_batches) == (2.0, 0)


@pytest.mark.parametrize("passes", [0, 2])
def test_a_micro_batch_has_one_backward_pass(passes):
    model = Probe()
    engine, sharded = engine_of(model, accumulation=1)
    for _ in range(passes):
        engine(torch.tensor(1.0)).backward()
    with pytest.raises(
        RuntimeError,
        match=rf"for micro-batch 1 .* passes since then is {passes}: .* call backward\(\) once per micro-batch",
    ):
        engine.step()
    assert engine.counters.micro_steps == 0
    assert (model.weight.item(), sharded.micro_batches) == (0, passes)
    engine.zero_grad()
    assert run(engine, 1.0) == [True]


def test_with_a_boundary_said_every_backward_pass_is_a_micro_batch():
    model = Probe()
    engine, _ = engine_of(model, accumulation=1)
    for gradients in ([1.0, 2.0, 6.0], [4.0, 2.0]):
        for gradient in gradients:
            engine.set_gradient_accumulation_boundary(is_boundary=gradient == gradients[-1])
            backward(engine, gradient)
        assert engine.step().grad_norm == 3.0
    assert engine.counters.micro_steps == 5
    with pytest.raises(RuntimeError, match="backward passes since then is 0"):
        engine.step()


def test_gradients_that_step_has_not_seen_count_when_saving(tmp_path):
    engine, _ = engine_of(Probe(), accumulation=2)
    backward(engine, 1.0)
    with pytest.raises(RuntimeError, match="gradients of 1 micro-batches would be lost"):
        engine.save_checkpoint(tmp_path)


def test_the_last_backward_pass_of_a_step_runs_outside_no_sync():
    model = Probe()
    engine, _ = engine_of(model, accumulation=2)
    with engine.no_sync():
        run(engine, 1.0)
        backward(engine, 1.0)
    with pytest.raises(RuntimeError, match=r"within no_sync\(\): run the last one of each optimizer step outside"):
        engine.step()
    engine.zero_grad()
    with engine.no_sync():
        run(engine, 1.0)
    assert run(engine, 3.0) == [True]
    assert model.weight.item() == pytest.approx(-0.2)


def test_without_an_optimizer_step_says_so_first():
    engine, _ = engine_of(Probe(), accumulation=1)
    engine.optimizer = None
    with pytest.raises(RuntimeError, match=r"there is no optimizer, .* add the section 'optimizer'"):
        engine.step()


def test_the_end_of_the_loss_scale_names_the_parameter():
    engine, _ = engine_of(Probe(), accumulation=1, scale=LossScale(scale=1.0, window=10))
    with pytest.raises(RuntimeError, match=r"the gradient of weight is not finite: .* smallest loss scale"):
        run(engine, INF)
