"""What the engine does in a step: boundaries, clipping, loss scale, skipping, schedules, counters."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from ds_core.engine import Engine
from ds_core.loss_scale import LossScale
from ds_core.policy import StepOutcome
from ds_core.schedules import Scheduler, WarmupLR

from .plain import INF, NAN, Probe, engine_of


def run(engine: Engine, *gradients: float) -> list[StepOutcome]:
    outcomes = []
    for gradient in gradients:
        engine.backward(engine(torch.tensor(gradient)))
        outcomes.append(engine.step())
    return outcomes


def test_updates_once_per_accumulation_with_the_mean():
    model = Probe()
    engine, _ = engine_of(model, accumulation=2)
    first, second = run(engine, 1.0, 3.0)
    assert (first.boundary, second.boundary) == (False, True)
    assert second.grad_norm == 2.0
    assert model.weight.item() == pytest.approx(-0.1 * 2.0)
    assert engine.counters._asdict() == {
        "global_steps": 1, "micro_steps": 2, "skipped_steps": 0, "skips_in_a_row": 0
    }  # fmt: skip


def test_clips_like_torch():
    model, reference = Probe(), torch.nn.Parameter(torch.zeros(()))
    engine, _ = engine_of(model, accumulation=1, clip=0.5)
    run(engine, 4.0)
    reference.grad = torch.tensor(4.0)
    torch.nn.utils.clip_grad_norm_([reference], 0.5)
    assert model.weight.item() == pytest.approx(-0.1 * reference.grad.item(), rel=1e-6)


def test_small_gradients_are_not_clipped():
    model = Probe()
    engine, _ = engine_of(model, accumulation=1, clip=0.5)
    run(engine, 0.25)
    assert model.weight.item() == pytest.approx(-0.1 * 0.25)


def test_a_backward_pass_without_the_loss_scale_is_refused():
    model = Probe()
    engine, _ = engine_of(model, accumulation=1, scale=LossScale(scale=8.0))
    engine(torch.tensor(1.0)).backward()
    with pytest.raises(RuntimeError, match=r"call engine.backward\(loss\)"):
        engine.step()
    assert model.weight.item() == 0.0
    engine.zero_grad()
    (outcome,) = run(engine, 1.0)
    assert outcome.grad_norm == 1.0


def test_loss_scale_cancels_out():
    model = Probe()
    engine, _ = engine_of(model, accumulation=1, clip=10.0, scale=LossScale(scale=1024.0))
    (outcome,) = run(engine, 3.0)
    assert (outcome.grad_norm, outcome.loss_scale) == (3.0, 1024.0)
    assert model.weight.item() == pytest.approx(-0.3)


def test_float16_loss_does_not_overflow_under_the_scale():
    model = Probe().half()
    engine, _ = engine_of(model, accumulation=1, scale=LossScale(scale=2.0**16))
    loss = engine(torch.tensor(1.0).half()) + 8.0
    assert engine.backward(loss) is loss
    assert model.weight.grad is not None
    assert not torch.isnan(model.weight.grad)


def test_overflow_skips_and_lowers_the_scale(caplog):
    model = Probe()
    scale = LossScale(scale=8.0, window=100, hysteresis=1)
    scheduler_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = Scheduler(scheduler_optimizer, WarmupLR(warmup_num_steps=10))
    engine, _ = engine_of(model, accumulation=1, scale=scale, lr_scheduler=schedule)
    with caplog.at_level(logging.WARNING, "ds_core"):
        (outcome,) = run(engine, INF)
    assert outcome.skipped
    assert model.weight.item() == 0
    assert "optimizer step 1 is left out: the gradient of weight is not finite (loss scale 8)" in caplog.text
    with pytest.raises(RuntimeError, match="need to call step"):
        schedule.get_last_lr()
    (outcome,) = run(engine, 1.0)
    assert outcome == StepOutcome(boundary=True, skipped=False, grad_norm=1.0, loss_scale=4.0)
    assert (engine.counters.global_steps, engine.counters.skipped_steps) == (2, 1)
    assert schedule.get_last_lr()


def test_skipping_for_ever_is_an_error_that_names_the_parameter():
    engine, _ = engine_of(Probe(), accumulation=1, max_skips=2)
    run(engine, NAN, NAN, 1.0, NAN, NAN)
    with pytest.raises(RuntimeError, match=r"gradient of weight is not finite, and 3 optimizer steps in a row"):
        run(engine, NAN)


def test_not_finite_gradients_may_be_let_through():
    model = Probe()
    engine, _ = engine_of(model, accumulation=1, skip_not_finite=False)
    (outcome,) = run(engine, NAN)
    assert not outcome.skipped
    assert model.weight.isnan()


def test_boundary_can_be_set_from_outside():
    engine, _ = engine_of(Probe(), accumulation=4)
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    assert [outcome.boundary for outcome in run(engine, 1.0, 1.0)] == [True, True]
    engine.set_gradient_accumulation_boundary(is_boundary=False)
    assert [outcome.boundary for outcome in run(engine, *[1.0] * 5)] == [False] * 5
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    assert run(engine, 7.0)[0].grad_norm == 2.0
    engine.set_gradient_accumulation_boundary(is_boundary=None)
    assert [outcome.boundary for outcome in run(engine, *[1.0] * 4)] == [False, False, False, True]


def test_no_sync_is_undone_whatever_happens():
    engine, sharded = engine_of(Probe())
    stack = contextlib.ExitStack()
    stack.enter_context(engine.no_sync())
    assert sharded.synced == [False]
    stack.__exit__(ArithmeticError, ArithmeticError(), None)
    assert sharded.synced == [False, True]


def test_zero_grad_drops_what_was_accumulated():
    model = Probe()
    engine, _ = engine_of(model, accumulation=2)
    run(engine, 100.0)
    engine.zero_grad()
    assert [outcome.boundary for outcome in run(engine, 1.0, 3.0)] == [False, True]
    assert model.weight.item() == pytest.approx(-0.2)


def test_backward_wants_a_scalar():
    engine, _ = engine_of(Probe())
    with pytest.raises(ValueError, match=r"scalar loss, got shape \[3\]: reduce it with .mean\(\)"):
        engine.backward(torch.zeros(3))


def test_backward_wants_a_loss_with_a_graph():
    engine, sharded = engine_of(Probe())
    with pytest.raises(ValueError, match=r"requires no gradient: it was detached, .* nothing it depends on is trained"):
        engine.backward(engine(torch.tensor(1.0)).detach())
    assert sharded.micro_batches == 0


def test_inputs_are_cast_where_asked_and_only_floating_ones():
    model = Probe()
    engine, _ = engine_of(model, cast_inputs=torch.float16)
    engine(torch.tensor(1.0))
    engine(torch.tensor(1))
    assert [x.dtype for x in model.seen] == [torch.float16, torch.int64]


def test_train_and_eval_switch_the_model():
    model = Probe()
    engine, _ = engine_of(model)
    assert engine.eval() is engine
    assert not model.training
    assert engine.train().module.training


def test_what_users_of_deepspeed_ask():
    engine, _ = engine_of(Probe(), accumulation=2, max_skips=9)
    assert engine.get_global_grad_norm() is None
    assert not engine.was_step_applied()
    asked = (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
    assert asked == (2, 1, 2)
    assert engine.get_lr() == [0.1]
    run(engine, 3.0)
    assert not engine.was_step_applied()
    run(engine, 1.0)
    assert engine.was_step_applied()
    assert (engine.get_global_grad_norm(), engine.global_samples, engine.skipped_steps) == (2.0, 2, 0)
    run(engine, 1.0, INF)
    assert not engine.was_step_applied()
    assert (engine.get_global_grad_norm(), engine.global_samples, engine.skipped_steps) == (INF, 4, 1)


# Randomness #


def draws(rank: int, num_ranks: int, count: int, **settings: Any) -> list[float]:
    model = Probe()
    engine, _ = engine_of(model, rank=rank, num_ranks=num_ranks, **settings)
    run(engine, *[1.0] * count)
    return model.drawn


def test_random_numbers_belong_to_the_global_micro_batch():
    one = draws(0, 1, 4)
    two = [draws(rank, 2, 2) for rank in range(2)]
    assert [two[index % 2][index // 2] for index in range(4)] == one
    assert len(set(one)) == 4
    assert draws(0, 1, 4, seed=5) != one


def test_forward_passes_of_one_micro_batch_differ():
    model = Probe()
    engine, _ = engine_of(model)
    engine(torch.tensor(1.0))
    engine(torch.tensor(1.0))
    assert model.drawn[0] != model.drawn[1]


def test_the_callers_random_numbers_are_left_alone():
    engine, _ = engine_of(Probe())
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    engine(torch.tensor(1.0))
    assert torch.equal(torch.rand(2), want)


def test_evaluation_draws_from_the_callers_generator():
    model = Probe()
    engine, _ = engine_of(model)
    engine.eval()
    torch.manual_seed(3)
    want = torch.rand(()).item()
    torch.manual_seed(3)
    engine(torch.tensor(1.0))
    assert model.drawn == [want]


# Checkpoints #


def test_training_goes_on_from_a_checkpoint(tmp_path):
    model = Probe()
    engine, _ = engine_of(model, scale=LossScale(scale=4.0, window=2))
    run(engine, 1.0, 2.0, 3.0, 4.0)
    folder = engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
    assert folder == str(tmp_path / "global_step2")
    other = Probe()
    resumed, _ = engine_of(other, scale=LossScale(scale=4.0, window=2))
    assert resumed.load_checkpoint(tmp_path) == (folder, {"epoch": 3})
    assert torch.equal(other.weight, model.weight)
    assert resumed.counters == engine.counters
    assert run(resumed, 1.0, 1.0)[-1] == run(engine, 1.0, 1.0)[-1]


def test_micro_steps_follow_the_number_of_ranks(tmp_path):
    engine, _ = engine_of(Probe())
    run(engine, 1.0, 1.0, 1.0, 1.0)
    engine.save_checkpoint(tmp_path)
    resumed, _ = engine_of(Probe(), num_ranks=2, accumulation=1)
    resumed.load_checkpoint(tmp_path)
    assert resumed.counters.micro_steps == 2


def test_saving_within_a_step_is_an_error(tmp_path):
    engine, _ = engine_of(Probe(), accumulation=2)
    run(engine, 1.0)
    with pytest.raises(RuntimeError, match="gradients of 1 micro-batches would be lost"):
        engine.save_checkpoint(tmp_path)


def test_client_state_must_be_json(tmp_path):
    engine, _ = engine_of(Probe())
    with pytest.raises(ValueError, match=r"client_state.nested.tensor must be a JSON value, got .* never pickled"):
        engine.save_checkpoint(tmp_path, client_state={"nested": {"tensor": torch.ones(1)}})
    assert not list(tmp_path.iterdir())
