"""The effective configuration, its schema, and the documentation of every field."""

import json
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace

import pytest
from ds_core import schedules
from ds_core.config import Config, effective, parse, sections
from ds_core.config.schema import field_docs, schema
from ds_core.registry import MissingPluginError

DATACLASSES = [
    each for each in (*vars(sections).values(), *schedules.SCHEDULES) if isinstance(each, type) and is_dataclass(each)
]

RAW = {
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 0.1, "adam_w_mode": False, "betas": [0.9, 0.95]}},
    "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": [0.1], "cycle_max_lr": 1}},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "collectives": {"name": "disk", "path": "/data"},
    "fp16": {"enabled": True, "loss_scale": 128},
    "steps_per_print": float("inf"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero:
    stage: int = 0
    names: tuple[str, ...] = ("Block",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    path: str = ""


@dataclass(frozen=True)
class FakePlugin:
    config_type: type | None
    role_version: int = 1

    def build(self, config, context):
        return config


def load(group, name):
    known = {"zero": FakePlugin(Zero), "disk": FakePlugin(Disk), "bare": FakePlugin(None)}
    if name not in known:
        raise MissingPluginError(group, name, tuple(known))
    return known[name]


def test_the_effective_configuration_parses_to_itself():
    config = parse(RAW, 2, load)
    again = parse(json.loads(json.dumps(effective(config))), 2, load)
    assert replace(again, no_effect={}, chosen={}) == replace(config, no_effect={}, chosen={})
    assert again.optimizer.plugin.settings == {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0}
    assert effective(again) == effective(config)


def test_the_effective_configuration_has_all_defaults():
    values = effective(parse(RAW, 2, load))
    assert values["zero_optimization"] == {"stage": 2, "names": ["Block"]}
    assert values["collectives"] == {"name": "disk", "path": "/data"}
    assert values["scheduler"]["params"]["cycle_max_mom"] == 0.9
    assert values["fp16"]["loss_scale_window"] == 1000
    assert values["train_micro_batch_size_per_gpu"] == 4


def test_the_schema_has_every_key_with_default_and_description():
    whole = schema()
    json.dumps(whole)
    assert set(whole["properties"]) == sections.OWNED | set(sections.ROLE_GROUPS)
    assert set(effective(parse(RAW, 2, load))) <= set(whole["properties"])
    assert whole["properties"]["gradient_clipping"]["default"] == 1.0
    assert whole["properties"]["train_batch_size"]["description"].startswith("Samples of one optimizer step")
    fp16 = whole["$defs"]["Fp16"]
    assert set(fp16["properties"]) == {each.name for each in fields(sections.Fp16)}
    assert fp16["additionalProperties"] is False
    assert all("description" in part and "default" in part for part in fp16["properties"].values())


def test_the_schema_names_each_schedule():
    kinds = schema()["properties"]["scheduler"]["oneOf"]
    assert [kind["properties"]["type"]["const"] for kind in kinds] == [kind.__name__ for kind in schedules.SCHEDULES]


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_documented_and_every_class_is_frozen(kind):
    assert set(field_docs(kind)) == {each.name for each in fields(kind)}
    assert all(each.kw_only for each in fields(kind))
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)


def test_a_configuration_cannot_be_changed():
    config = parse({"train_batch_size": 8}, 1, load)
    with pytest.raises(FrozenInstanceError):
        config.seed = 3
    assert isinstance(config, Config)
