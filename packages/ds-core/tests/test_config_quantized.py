"""DeepSpeed's keys of quantized collectives."""

from __future__ import annotations

import pytest
from ds_core.config import parse
from ds_core.config.quantized import as_collectives
from ds_core.registry import MissingPluginError

BATCH = {"train_batch_size": 8}


def missing(group: str, name: str) -> None:
    raise MissingPluginError(group, name, ())


def load_any():
    class Anything:
        role_version, config_type = 1, None

    return Anything()


@pytest.mark.parametrize("value", [False, None, "auto"])
def test_off_is_nothing(value):
    raw = {"zero_optimization": {"stage": 1, "zero_quantized_weights": value}}
    assert as_collectives(raw) == {"zero_optimization": {"stage": 1}}


def test_both_make_one_section():
    raw = {"zero_optimization": {"zero_quantized_weights": True, "zero_quantized_gradients": True}}
    assert as_collectives(raw)["collectives"] == {"name": "compressed", "weights": "int8", "gradients": "int4"}


def test_without_the_wheel_the_way_to_it_is_named():
    raw = {**BATCH, "collectives": None, "zero_optimization": {"zero_quantized_gradients": True}}
    with pytest.raises(ValueError, match=r"plugin 'compressed' in the group 'ds.collectives'.*pip install ds-comm"):
        parse(raw, 1, lambda group, name: missing(group, name) if group == "ds.collectives" else load_any())


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="zero_quantized_weights must be true or false; got 8"):
        as_collectives({"zero_optimization": {"zero_quantized_weights": 8}})
    raw = {"zero_optimization": {"zero_quantized_weights": True}, "collectives": {"name": "mine"}}
    with pytest.raises(ValueError, match=r"zero_quantized_weights = True and collectives = \{'name': 'mine'\} both"):
        as_collectives(raw)
