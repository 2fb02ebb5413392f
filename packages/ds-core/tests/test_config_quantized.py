"""DeepSpeed's keys of quantized collectives."""

from __future__ import annotations

import pytest
from ds_core.config import parse
from ds_core.config.compression import as_section
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


CODED = {"name": "compressed", "gradients": "int4"}


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        (None, {}),
        ("auto", {}),
        ({}, {"error_beta": 0.8, "error_reset": 1024}),
        ({"err_beta": 0.5}, {"error_beta": 0.5, "error_reset": 1024}),
        ({"err_beta": 0.5, "reset_T": 64}, {"error_beta": 0.5, "error_reset": 64}),
    ],
)
def test_loco_averages_errors_of_gradients(value, settings):
    raw = {"zero_optimization": {"zero_quantized_gradients": True, "zeropp_loco_param": value}}
    assert as_collectives(raw) == {"zero_optimization": {}, "collectives": {**CODED, **settings}}


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (
            {"zeropp_loco_param": {"err_beta": 0.5}},
            r"about the errors of quantized gradients, which are off; set zero_opt",
        ),
        ({"zero_quantized_gradients": True, "zeropp_loco_param": 0.5}, r"must be an object with err_beta and reset_T"),
        (
            {"zero_quantized_gradients": True, "zeropp_loco_param": {"reset": 5}},
            r"zeropp_loco_param\.reset.*'?reset_T",
        ),
    ],
)
def test_what_loco_cannot_be_is_refused(zero, message):
    with pytest.raises(ValueError, match=message):
        as_collectives({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("dtype", "computed", "sent"),
    [
        ("bf16", None, "bf16"),
        ("fp16", None, "fp16"),
        ("fp16", "bf16", "fp16"),
        ("bf16", "bf16", None),
        ("fp32", "bf16", None),
        ("fp32", None, None),
        (None, "bf16", None),
        ("auto", None, None),
    ],
)
def test_gradients_are_rounded_only_to_another_lower_type(dtype, computed, sent):
    raw = {"communication_data_type": dtype, **({} if computed is None else {computed: {"enabled": True}})}
    given = as_collectives(raw)
    if sent is None:
        assert given == raw
    else:
        assert given["collectives"] == {"name": "compressed", "gradients": sent, "error_feedback": False}
        assert "communication_data_type" not in given


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"communication_data_type": "int8"},
            "communication_data_type must be one of fp32, fp16, bf16, or null; got 'int8'",
        ),
        (
            {"communication_data_type": "bf16", "zero_optimization": {"zero_quantized_gradients": True}},
            r"zero_quantized_gradients = True and communication_data_type = 'bf16' both say how gradients travel",
        ),
        (
            {"communication_data_type": "bf16", "collectives": {"name": "mine"}},
            r"communication_data_type = 'bf16' and collectives = \{'name': 'mine'\} both",
        ),
    ],
)
def test_types_that_contradict_are_named(raw, message):
    with pytest.raises(ValueError, match=message):
        as_collectives(raw)


def test_weights_in_8_bits_go_with_gradients_of_another_type():
    raw = {"communication_data_type": "bf16", "zero_optimization": {"zero_quantized_weights": True}}
    assert as_collectives(raw)["collectives"] == {
        "name": "compressed",
        "weights": "int8",
        "gradients": "bf16",
        "error_feedback": False,
    }


# The key ``compression`` #


@pytest.mark.parametrize(
    ("value", "settings"), [("auto", {}), ({"auto": {"step_seconds": 0.5}}, {"step_seconds": 0.5})]
)
def test_compression_is_short_for_a_section(value, settings):
    assert as_section({**BATCH, "compression": value}) == {
        **BATCH,
        "collectives": {"name": "compressed", "auto": settings},
    }


def test_no_compression_is_nothing():
    assert as_section({**BATCH, "compression": None}) == BATCH
    assert as_section(BATCH) == BATCH


@pytest.mark.parametrize("value", [True, "int4", {}, {"auto": {}, "block": 64}, {"auto": "yes"}])
def test_other_values_of_compression_are_named(value):
    with pytest.raises(ValueError, match="compression must be 'auto', or an object"):
        as_section({"compression": value})


def test_compression_besides_other_codes_is_refused():
    raw = {**BATCH, "compression": "auto", "zero_optimization": {"zero_quantized_gradients": True}}
    with pytest.raises(ValueError, match=r"compression = 'auto' and collectives = .* both say how ranks communicate"):
        parse(raw, 1, lambda group, name: load_any())
