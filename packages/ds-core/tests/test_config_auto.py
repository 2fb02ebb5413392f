"""The value "auto": chosen where that is possible, refused where only the caller can know."""

import logging

import pytest
from ds_core.config import announce, parse
from ds_core.config.auto import CALLER_KNOWS
from ds_core.registry import MissingPluginError


def no_plugins(group, name):
    raise MissingPluginError(group, name, ())


def test_batch_sizes_follow_from_the_batch_rule():
    raw = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
    }
    config = parse(raw, 2, no_plugins)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (8, 1)
    assert config.chosen == {"train_batch_size": "8", "gradient_accumulation_steps": "1"}


def test_no_batch_size_at_all_is_an_error():
    for raw in ({}, {"train_micro_batch_size_per_gpu": "auto"}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(ValueError, match=r"(?s)^train_batch_size = 'auto', .* the others follow.*\nPut values"):
            parse({"train_batch_size": "auto", **raw}, 2, no_plugins)


def test_other_keys_take_their_default():
    raw = {
        "train_batch_size": 8,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "dataloader_drop_last": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": "auto", "weight_decay": "auto"}},
        "kernels": {"backend": "auto"},
    }
    config = parse(raw, 1, no_plugins)
    assert config.gradient_clipping == 1.0
    assert not config.bf16.enabled
    assert config.optimizer.plugin.settings == {"lr": 0.1, "weight_decay": 0.0}
    assert config.kernels.backend == "auto"
    assert config.chosen == {
        "gradient_clipping": "1.0",
        "bf16.enabled": "False",
        "dataloader_drop_last": "False",
        "optimizer.params.betas": "its default",
        "optimizer.params.weight_decay": "its default",
        "optimizer.type": config.optimizer.note,
    }


def test_the_warm_up_ends_at_the_optimizers_learning_rate():
    raw = {
        "train_batch_size": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.25}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_min_lr": "auto"}},
    }
    config = parse(raw, 1, no_plugins)
    assert config.scheduler.warmup_max_lr == 0.25
    assert config.scheduler.warmup_min_lr == 0.0
    assert config.chosen["scheduler.params.warmup_max_lr"] == "0.25"


@pytest.mark.parametrize("path", CALLER_KNOWS)
def test_what_only_the_caller_knows_is_refused_by_name(path):
    value = "auto"
    for key in reversed(path.split(".")):
        value = {key: value}
    with pytest.raises(ValueError, match=rf"{path} = 'auto', but only the caller knows") as caught:
        parse(value if path.startswith("train_") else {"train_batch_size": 8, **value}, 1, no_plugins)
    assert CALLER_KNOWS[path] in str(caught.value)


def test_all_that_the_caller_must_fill_in_comes_in_one_error():
    raw = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
    }
    with pytest.raises(ValueError) as caught:
        parse(raw, 1, no_plugins)
    keys = ["optimizer.params.lr", "scheduler.params.warmup_num_steps", "scheduler.params.warmup_max_lr"]
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()[:-1]] == keys


def test_one_line_of_log_names_all_choices(caplog):
    config = parse({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "seed": "auto"}, 4, no_plugins)
    with caplog.at_level(logging.INFO, "ds_core"):
        announce(config)
    assert [record.getMessage() for record in caplog.records] == [
        "chosen where the configuration left it open: seed = 1234, train_batch_size = 8"
    ]
