"""Whole files in the form that Hugging Face, Lightning and DeepSpeed's own examples write."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from ds_core.config import parse, read
from ds_core.registry import MissingPluginError

TEMPLATES = sorted((Path(__file__).parent / "data" / "templates").glob("*.json"))
WITH_AUTO = [path for path in TEMPLATES if '"lr": "auto"' in path.read_text()]
COMPLETE = [path for path in TEMPLATES if path not in WITH_AUTO]

# What Hugging Face's Trainer fills in from its own arguments.
FILLED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.7,
    "optimizer.params.lr": 5e-5,
    "optimizer.params.betas": [0.9, 0.95],
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.01,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_max_lr": 5e-5,
    "scheduler.params.warmup_num_steps": 100,
    "scheduler.params.total_num_steps": 1000,
    "fp16.enabled": False,
    "bf16.enabled": True,
    "zero_optimization.reduce_bucket_size": 1024 * 1024,
    "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * 1024 * 1024),
    "zero_optimization.stage3_param_persistence_threshold": 10 * 1024,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    stage: int = 0


@dataclass(frozen=True)
class ZeroPlugin:
    role_version: int = 1
    config_type: type = Zero

    def build(self, config, context):
        return config


def load(group, name):
    if (group, name) == ("ds.partitioner", "zero"):
        return ZeroPlugin()
    raise MissingPluginError(group, name, ())


def filled(value, path=""):
    if isinstance(value, dict):
        return {key: filled(inner, f"{path}.{key}" if path else key) for key, inner in value.items()}
    return FILLED[path] if value == "auto" else value


@pytest.mark.parametrize("path", WITH_AUTO, ids=lambda path: path.stem)
def test_a_template_that_the_trainer_has_filled_in_works(path):
    config = parse(filled(read(path)), 4, load)
    assert config.plugins["partitioner"].config.stage == int(path.stem[-1])
    assert config.train_micro_batch_size_per_gpu == 8
    assert config.optimizer.plugin.settings["lr"] == 5e-5
    assert config.scheduler.warmup_max_lr == 5e-5
    assert config.gradient_clipping == 0.7
    assert config.fp16.enabled != config.bf16.enabled
    assert set(config.chosen) <= {"optimizer.type"}
    logs = {"steps_per_print", "wall_clock_breakdown"}
    assert all(key.startswith("zero_optimization.") or key in logs for key in config.no_effect)


@pytest.mark.parametrize("path", WITH_AUTO, ids=lambda path: path.stem)
def test_a_template_that_nobody_has_filled_in_names_the_keys(path):
    with pytest.raises(ValueError) as caught:
        parse(read(path), 4, load)
    keys = [line.split(" ")[0] for line in str(caught.value).splitlines()[:-1]]
    assert keys[0] == "optimizer.params.lr"
    assert "scheduler.params.warmup_num_steps" in keys
    assert "train_micro_batch_size_per_gpu" in keys
    assert not any(key.startswith(("zero_optimization", "gradient")) for key in keys)


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_a_complete_file_works_unchanged(path):
    config = parse(read(path), 2, load)
    assert config.plugins["partitioner"].config.stage in (1, 2)
    assert config.train_batch_size == 16


def test_there_are_templates_of_both_kinds():
    assert len(WITH_AUTO) == 5
    assert len(COMPLETE) == 2


def test_offload_is_refused_by_name_and_by_wheel():
    raw = filled(read(WITH_AUTO[0]))
    raw["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    with pytest.raises(ValueError, match=r"offload_optimizer.device = 'cpu' asks for optimizer offload.*ds-offload"):
        parse(raw, 4, load)
