"""Rules between sections."""

import pytest
from ds_core.config import parse
from ds_core.registry import MissingPluginError


def no_plugins(group, name):
    raise MissingPluginError(group, name, ())


def parsed(*, client_optimizer=False, **raw):
    return parse({"train_batch_size": 8, **raw}, 1, no_plugins, client_optimizer=client_optimizer)


def test_one_low_precision_at_a_time():
    with pytest.raises(ValueError, match=r"fp16.enabled and bf16.enabled are both True"):
        parsed(fp16={"enabled": True}, bf16={"enabled": True})
    assert parsed(fp16={"enabled": False}, bf16={"enabled": True}).bf16.enabled


def test_a_schedule_needs_an_optimizer():
    scheduler = {"type": "WarmupLR"}
    with pytest.raises(ValueError, match=r"scheduler = \{'type': 'WarmupLR'\} has no optimizer to work on"):
        parsed(scheduler=scheduler)
    assert parsed(scheduler=scheduler, client_optimizer=True).scheduler.warmup_num_steps == 1000
    assert parsed(scheduler=scheduler, optimizer={"type": "SGD"}).scheduler.warmup_num_steps == 1000


def test_an_optimizer_of_the_caller_wins_and_that_is_recorded():
    section = {"type": "SGD", "params": {"lr": "auto"}}
    config = parsed(optimizer=section, client_optimizer=True)
    assert config.optimizer is None
    assert config.no_effect == {"optimizer": "the caller passes an optimizer, which wins"}


def test_clipping_is_no_setting_of_an_optimizer():
    with pytest.raises(ValueError, match=r"max_grad_norm = 0.5 is not read .*; set gradient_clipping = 0.5 instead"):
        parsed(optimizer={"type": "AdamW", "params": {"max_grad_norm": 0.5}})


def test_all_contradictions_come_in_one_error():
    with pytest.raises(ValueError) as caught:
        parsed(fp16={"enabled": True}, bf16={"enabled": True}, scheduler={"type": "WarmupLR"})
    assert len(str(caught.value).splitlines()) == 2
