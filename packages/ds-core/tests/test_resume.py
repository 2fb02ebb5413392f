"""Saving and loading an engine: what is kept, what is refused, and that nothing is changed by a load that fails."""

from __future__ import annotations

import json
import logging
from typing import Any

import ds_core
import pytest
import torch
from ds_core._json import decode_state, encode_state
from ds_core.checkpoint import CheckpointError
from ds_core.data import Dealing, TrainLoader
from ds_core.engine import Engine
from ds_core.loss_scale import LossScale
from torch import nn
from torch.optim import lr_scheduler

from .checkpoint_kit import run_ranks
from .plain import INF, Probe, engine_of

DYNAMIC = LossScale(scale=8.0, window=2, full_hysteresis=2, hysteresis=2)


def run(engine: Engine, *gradients: float) -> None:
    for gradient in gradients:
        engine.backward(engine(torch.tensor(gradient)))
        engine.step()


# Loss scale #


def scale_after_resume(tmp_path: Any, saved: LossScale, own: LossScale, *gradients: float) -> LossScale:
    engine, _ = engine_of(Probe(), accumulation=1, scale=saved)
    run(engine, *gradients)
    engine.save_checkpoint(tmp_path)
    resumed, _ = engine_of(Probe(), accumulation=1, scale=own)
    resumed.load_checkpoint(tmp_path)
    return resumed._scale


def test_the_loss_scale_goes_on_where_it_was(tmp_path):
    got = scale_after_resume(tmp_path, DYNAMIC, DYNAMIC._replace(scale=64.0), INF, INF, 1.0)
    assert got == DYNAMIC._replace(scale=4.0, hysteresis=1, step=3, last_overflow=1)


def test_settings_of_the_loss_scale_are_this_runs(tmp_path):
    own = DYNAMIC._replace(window=7, full_hysteresis=1, hysteresis=1, consecutive=True, min_scale=16.0, scale=16.0)
    assert scale_after_resume(tmp_path, DYNAMIC, own, 1.0) == own._replace(step=1)


@pytest.mark.parametrize("static", [LossScale(scale=1.0), LossScale(scale=128.0)])
def test_a_static_loss_scale_is_neither_saved_nor_loaded(tmp_path, static):
    assert scale_after_resume(tmp_path / "a", static, DYNAMIC, 1.0) == DYNAMIC
    assert scale_after_resume(tmp_path / "b", DYNAMIC, static, 1.0) == static


# Schedules #

SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.5**x),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.MultiStepLR(o, [2])], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.MultiStepLR(o, [4])]
    ),
}


def rates(engine: Engine, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        run(engine, 1.0)
        seen.append(engine.optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_torch_goes_on_exactly(tmp_path, name):
    engine, _ = engine_of(Probe(), accumulation=1, lr_scheduler=SCHEDULES[name])
    rates(engine, 4)
    engine.save_checkpoint(tmp_path)
    resumed, _ = engine_of(Probe(), accumulation=1, lr_scheduler=SCHEDULES[name])
    resumed.load_checkpoint(tmp_path)
    assert rates(resumed, 8) == rates(engine, 8)


def test_a_schedules_state_survives_json():
    state = {"milestones": {1: 2, None: {"$tuple": 3}}, "range": [(0.5, [1]), INF], "text": {"1": (), "$x": None}}
    assert decode_state(json.loads(json.dumps(encode_state(state, "s")))) == state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"lr": [torch.ones(2)]}, r"lr_scheduler\.lr\[0\] must be a JSON value, got tensor"),
        ({"by": {(1, 2): 3}}, r"keys must be numbers or strings, got \(1, 2\) in lr_scheduler\.by"),
    ],
)
def test_a_schedules_state_that_is_not_json_is_named_when_saving(tmp_path, state, message):
    class Odd(lr_scheduler.ConstantLR):
        def state_dict(self):
            return state

    engine, _ = engine_of(Probe(), lr_scheduler=Odd)
    with pytest.raises(ValueError, match=message + r".*: it cannot be saved"):
        engine.save_checkpoint(tmp_path)


# Client state #


@pytest.mark.parametrize("state", [{1: 2}, {"a": [{"b": {2: 3}}]}])
def test_keys_of_client_state_are_strings(tmp_path, state):
    engine, _ = engine_of(Probe())
    place = "client_state" if 1 in state else r"client_state\.a\[0\]\.b"
    with pytest.raises(ValueError, match=rf"keys must be strings, got \d in {place}: it cannot be saved"):
        engine.save_checkpoint(tmp_path, client_state=state)


def test_client_state_of_one_rank_that_is_not_json_is_an_error_on_all(tmp_path):
    def body(control):
        engine, _ = engine_of(Probe(), control=control)
        return engine.save_checkpoint(tmp_path, client_state={"x": object() if control.rank == 1 else 1})

    for result in run_ranks(2, body):
        assert type(result) is ds_core.RankError
        assert str(result).startswith("rank 1: ValueError: client_state.x must be a JSON value")


# A load that fails changes nothing #


class Two(nn.Module):
    """Two parameters, one of which older checkpoints lack."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(5.0))
        self.added = nn.Parameter(torch.tensor(7.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.added


def loader_of(micro_size: int) -> TrainLoader:
    dealing = Dealing(rank=0, num_ranks=1, micro_size=micro_size, step_size=micro_size, seed=1, drop_last=False)
    return TrainLoader([float(index) for index in range(12)], dealing)  # type: ignore[arg-type]


def everything(engine: Engine) -> Any:
    schedule, loader = engine.lr_scheduler, engine.training_dataloader
    return (
        [param.tolist() for param in engine.module.parameters()],
        engine.counters,
        engine._scale,
        None if schedule is None else dict(schedule.state_dict()),
        None if loader is None else loader.state_dict(),
        [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups],
    )


@pytest.mark.parametrize("wrong", ["model", "schedule", "data"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, wrong):
    step = SCHEDULES["StepLR"]
    engine, _ = engine_of(Probe(), accumulation=1, lr_scheduler=step, training_dataloader=loader_of(3))
    next(iter(engine.training_dataloader))
    run(engine, 1.0)
    engine.save_checkpoint(tmp_path)
    model = Two() if wrong == "model" else Probe()
    schedule = SCHEDULES["LinearLR"] if wrong == "schedule" else step
    loader = loader_of(2 if wrong == "data" else 3)
    other, _ = engine_of(model, accumulation=1, lr_scheduler=schedule, training_dataloader=loader)
    before = everything(other)
    message = {"model": "added: not in the checkpoint", "schedule": "StepLR, this run has LinearLR", "data": "position"}
    with pytest.raises(ValueError, match=message[wrong]):
        other.load_checkpoint(tmp_path)
    assert everything(other) == before


def test_what_only_one_side_has_stays_as_it_is_where_asked(tmp_path):
    model = Probe()
    engine, _ = engine_of(model, accumulation=1)
    run(engine, 1.0)
    engine.save_checkpoint(tmp_path)
    other = Two()
    resumed, _ = engine_of(other)
    resumed.load_checkpoint(tmp_path, load_module_strict=False)
    assert (other.weight.item(), other.added.item()) == (model.weight.item(), 7.0)


def test_without_optimizer_states_its_settings_and_the_loss_scale_stay(tmp_path):
    engine, _ = engine_of(Probe(), accumulation=1, lr=0.5, scale=DYNAMIC)
    run(engine, INF, INF, 1.0)
    engine.save_checkpoint(tmp_path)
    resumed, _ = engine_of(Probe(), accumulation=1, lr=0.25, scale=DYNAMIC)
    resumed.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.25
    assert resumed._scale == DYNAMIC
    assert resumed.counters == engine.counters
    assert torch.equal(resumed.module.weight, engine.module.weight)


# Damage #


def history(tmp_path: Any, *damaged: str) -> None:
    """Save ``a``, ``b`` and ``c`` with weights -0.1, -0.2, -0.3; flip a byte in the data of some."""
    engine, _ = engine_of(Probe(), accumulation=1)
    for tag in "abc":
        run(engine, 1.0)
        engine.save_checkpoint(tmp_path, tag)
    for tag in damaged:
        path = tmp_path / tag / "shard-00000-00.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(("damaged", "taken"), [("c", "b"), ("cb", "a")])
def test_without_a_tag_the_last_one_whose_every_byte_verifies_is_taken(tmp_path, caplog, damaged, taken):
    history(tmp_path, *damaged)
    model = Probe()
    engine, _ = engine_of(model)
    with caplog.at_level(logging.WARNING, "ds_core"):
        folder, _ = engine.load_checkpoint(tmp_path)
    assert folder == str(tmp_path / taken)
    assert model.weight.item() == pytest.approx(-0.1 if taken == "a" else -0.2)
    (record,) = caplog.records
    assert f"opening {tmp_path / taken} after skipping:" in record.getMessage()
    for tag in damaged:
        assert f"{tag} is damaged:\n  param/weight, elements [0, 1): bytes" in record.getMessage()


def test_with_a_tag_damage_is_an_error_that_names_another_one(tmp_path):
    history(tmp_path, "c")
    engine, _ = engine_of(Probe())
    with pytest.raises(CheckpointError, match=r"(?s)c is damaged:.*load the checkpoint before it: tag 'b'"):
        engine.load_checkpoint(tmp_path, "c")


def test_when_every_checkpoint_is_damaged_the_error_says_so_for_each(tmp_path):
    history(tmp_path, *"abc")
    engine, _ = engine_of(Probe())
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be opened.*c is dam.*b is dam.*a is dam"):
        engine.load_checkpoint(tmp_path)


def test_on_one_process_errors_are_the_documented_ones(tmp_path):
    history(tmp_path)
    with pytest.raises(ValueError, match="there is no checkpoint 'z'"):
        engine_of(Probe())[0].load_checkpoint(tmp_path, "z")
    with pytest.raises(ValueError, match="does not fit the model"):
        engine_of(Two())[0].load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint can be opened"):
        engine_of(Probe())[0].load_checkpoint(tmp_path / "nowhere")


def test_ranks_fall_back_together_and_fail_together(tmp_path):
    history(tmp_path, "c")

    def load(control):
        return engine_of(Probe(), control=control)[0].load_checkpoint(tmp_path)[0]

    def load_damaged(control):
        return engine_of(Probe(), control=control)[0].load_checkpoint(tmp_path, "c")

    def load_misfit(control):
        return engine_of(Two() if control.rank else Probe(), control=control)[0].load_checkpoint(tmp_path)

    assert run_ranks(2, load) == [str(tmp_path / "b")] * 2
    assert [type(result) for result in run_ranks(2, load_damaged)] == [CheckpointError] * 2
    for result in run_ranks(2, load_misfit):
        assert type(result) is ds_core.RankError
        assert str(result).startswith("rank 1: ValueError: checkpoint 'c' does not fit the model")
