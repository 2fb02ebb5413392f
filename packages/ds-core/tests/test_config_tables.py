"""Keys without effect, features that are not there, and keys that do not exist."""

import json
import logging

import pytest
from ds_core.config import announce, parse
from ds_core.config.no_effect import NO_EFFECT
from ds_core.config.strip import strip
from ds_core.config.unavailable import UNAVAILABLE
from ds_core.registry import MissingPluginError


def no_plugins(group, name):
    raise MissingPluginError(group, name, ())


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def parsed(**raw):
    return parse({"train_batch_size": 8, **raw}, 1, no_plugins)


@pytest.mark.parametrize("path", [path for path in NO_EFFECT if not path.endswith("*")])
def test_keys_without_effect_are_taken_out_and_recorded(path):
    result = strip(nested(path, "any value"))
    assert result.no_effect == {path: NO_EFFECT[path]}
    assert path not in json.dumps(result.kept)


@pytest.mark.parametrize("path", [path for path in NO_EFFECT if path.endswith("*")])
def test_a_star_stands_for_everything_below(path):
    key = path.replace("*", "some.key")
    assert strip(nested(key, 3)).no_effect == {path.replace("*", "some"): NO_EFFECT[path]}


@pytest.mark.parametrize("path", UNAVAILABLE)
def test_values_that_do_not_ask_for_a_feature_pass_without_a_word(path):
    for value in (*UNAVAILABLE[path].off, None, "auto"):
        assert strip(nested(path, value)).no_effect == {}


@pytest.mark.parametrize("path", UNAVAILABLE)
def test_other_values_name_the_feature_and_the_way_out(path):
    feature = UNAVAILABLE[path]
    with pytest.raises(ValueError) as caught:
        strip(nested(path, "something else"))
    message = str(caught.value)
    assert message.startswith(f"{path} = 'something else' asks for {feature.name}")
    assert "does not provide" in message
    assert feature.wheel is None or feature.wheel in message
    assert all(json.dumps(off) in message for off in feature.off)


def test_a_switch_is_no_number():
    with pytest.raises(ValueError, match=r"sequence_parallel_size = True asks for sequence"):
        strip({"sequence_parallel_size": True})


def test_names_are_compared_in_any_case():
    assert strip({"gradient_allreduce_op": "MEAN"}).kept == {}


def test_all_refusals_come_in_one_error():
    raw = {"zero_optimization": {"offload_param": {"device": "cpu"}}, "tensorboard": {"enabled": True}}
    with pytest.raises(ValueError) as caught:
        strip(raw)
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "zero_optimization.offload_param.device",
        "tensorboard.enabled",
    ]


def test_empty_and_absent_sections_ask_for_nothing():
    raw = {"tensorboard": {}, "wandb": None, "aio": "auto", "zero_optimization": {"offload_param": None}}
    assert strip(raw).kept == {"zero_optimization": {}}


def test_the_two_tables_are_disjoint():
    assert not set(NO_EFFECT) & set(UNAVAILABLE)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train_batch_siz": 4}, "unknown key train_batch_siz = 4; did you mean 'train_batch_size'?"),
        (
            {"gradient_clipp1ng": 1.0},
            "unknown key gradient_clipp1ng = 1.0; did you mean 'gradient_clipping'?",
        ),
        ({"optimzer": {}}, "unknown key optimzer = {}; did you mean 'optimizer'?"),
        ({"tensorbord": {}}, "unknown key tensorbord = {}; did you mean 'tensorboard'?"),
        ({"fp16": {"enable": True}}, "unknown key fp16.enable = True; did you mean 'fp16.enabled'?"),
        (
            {"checkpoint": {"load_univrsal": True}},
            "unknown key checkpoint.load_univrsal = True; did you mean 'checkpoint.load_universal'? It has no effect: "
            "checkpoints have one format, which loads on any number of ranks",
        ),
        (
            {"aio": {"blok_size": 1}},
            "unknown key aio.blok_size = 1; did you mean 'aio.block_size'? It has no effect: nothing is offloaded "
            "while device is 'none'",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "none"}}},
            "unknown key zero_optimization.offload_param.devise = 'none'; "
            "did you mean 'zero_optimization.offload_param.device'?",
        ),
        ({"optimizer": {"typ": "SGD"}}, "unknown key optimizer.typ = 'SGD'; did you mean 'optimizer.type'?"),
        ({"qqq": 1}, "unknown key qqq = 1"),
        ({"_comment": "x"}, "unknown key _comment = 'x'; no key starts with '_', and JSON has no comments: remove it"),
        ({"fp16": {"//": 1}}, "unknown key fp16.// = 1; no key starts with '/', and JSON has no comments: remove it"),
        ({"aio": 3}, "aio must be an object {...}; got 3"),
    ],
)
def test_unknown_keys_name_path_value_and_nearest(raw, message):
    with pytest.raises(ValueError) as caught:
        parsed(**raw)
    assert str(caught.value) == message


def test_all_unknown_keys_at_the_top_come_in_one_error():
    with pytest.raises(ValueError) as caught:
        parsed(stepss_per_print=1, sead=2)
    assert len(str(caught.value).splitlines()) == 2


def test_one_line_of_log_names_all_keys_without_effect(caplog):
    config = parsed(prescale_gradients=False, aio={"thread_count": 1}, optimizer={"type": "SGD"})
    with caplog.at_level(logging.INFO, "ds_core"):
        announce(config)
    (line,) = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert "aio.thread_count, prescale_gradients" in line


def test_loss_scale_settings_have_no_effect_where_float16_is_off():
    config = parsed(fp16={"loss_scale_window": 50, "hysteresis": 2, "auto_cast": True})
    assert config.no_effect == dict.fromkeys(["fp16.loss_scale_window", "fp16.auto_cast"], "fp16.enabled is false")
    assert parsed(fp16={"enabled": True, "loss_scale_window": 50}).no_effect == {}


def test_bf16_settings_have_no_effect_where_bfloat16_is_off():
    assert parsed(bf16={"auto_cast": True}).no_effect == {"bf16.auto_cast": "bf16.enabled is false"}
    assert parsed(bf16={"enabled": True, "auto_cast": True}).no_effect == {}
