"""Values of single sections: defaults, types and bounds, each error naming path and value."""

import math

import pytest
from ds_core.config import Config, parse
from ds_core.registry import MissingPluginError


def no_plugins(group, name):
    raise MissingPluginError(group, name, ())


def parsed(**raw):
    return parse({"train_batch_size": 8, **raw}, 1, no_plugins)


def test_an_almost_empty_file_gives_the_defaults_and_loads_no_plugin():
    def load(group, name):
        raise AssertionError(f"{group} {name} was loaded, though nothing names it")

    config = parse({"train_batch_size": 8}, 2, load)
    assert config == Config(train_batch_size=8, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=1)
    assert config.gradient_clipping == 1.0
    assert (config.fp16.initial_scale_power, config.fp16.loss_scale_window, config.fp16.hysteresis) == (
        16,
        1000,
        2,
    )
    assert config.seed == 1234


def test_null_is_the_default():
    assert parsed(fp16=None, optimizer=None, seed=None, zero_optimization=None) == parsed()
    sections = {
        "data_types": {"grad_accum_dtype": None, "keep_in_fp32_modules": None},
        "activation_checkpointing": {"number_checkpoints": None},
    }
    assert parsed(**sections) == parsed()


def test_a_whole_float_is_an_integer_but_a_fraction_is_not():
    assert parsed(seed=5e8).seed == 500_000_000
    with pytest.raises(ValueError, match=r"^seed: got 0.5, must be a valid integer"):
        parsed(seed=0.5)


def test_an_integer_is_a_float():
    clipping = parsed(gradient_clipping=2).gradient_clipping
    assert isinstance(clipping, float)
    assert clipping == 2.0


def test_steps_per_print_may_be_infinite():
    assert "steps_per_print" in parsed(steps_per_print=math.inf).no_effect


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train_batch_size": "8"}, "train_batch_size: got '8' (write it without quotes), must be a valid integer"),
        ({"train_batch_size": "eight"}, "train_batch_size: got 'eight', must be a valid integer"),
        (
            {"gradient_clipping": "1e-3"},
            "gradient_clipping: got '1e-3' (write it without quotes), must be a valid number",
        ),
        ({"fp16": {"enabled": "True"}}, "fp16.enabled: got 'True' (write it without quotes), must be a valid boolean"),
        (
            {"data_types": {"grad_accum_dtype": "32"}},
            "data_types.grad_accum_dtype: got '32', must be 'fp32', 'bf16' or 'fp16'",
        ),
        ({"train_batch_size": True}, "train_batch_size: got True, must be a valid integer"),
        ({"gradient_clipping": "x"}, "gradient_clipping: got 'x', must be a valid number"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled: got 1, must be a valid boolean"),
        ({"fp16": True}, "fp16: got True, must be an object"),
        ({"kernels": {"backend": 3}}, "kernels.backend: got 3, must be a valid string"),
        (
            {"data_types": {"grad_accum_dtype": "fp64"}},
            "data_types.grad_accum_dtype: got 'fp64', must be 'fp32', 'bf16' or 'fp16'",
        ),
        ({"optimizer": "AdamW"}, "optimizer must be an object {...}; got 'AdamW'"),
        (
            {"optimizer": {"params": {}}},
            "optimizer.type must be a name; got None in optimizer = {'params': {}}",
        ),
        ({"optimizer": {"type": "SGD", "params": 1}}, "optimizer.params must be an object {...}; got 1"),
        ({"gradient_clipping": -1}, "gradient_clipping must be finite and >= 0 (0 is off), got -1.0"),
        ({"gradient_clipping": math.inf}, "gradient_clipping must be finite and >= 0 (0 is off), got inf"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        (
            {"fp16": {"loss_scale": -2}},
            "fp16: loss_scale must be finite and >= 0 (0 is dynamic), got -2.0",
        ),
        (
            {"fp16": {"enabled": True, "hysteresis": 0}},
            "fp16: hysteresis must be positive for a dynamic loss scale, got 0",
        ),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 3, "min_loss_scale": 16}},
            "fp16: min_loss_scale = 16 must not be above the scale to start from, 2 ** initial_scale_power = 8",
        ),
        *(
            (
                {"fp16": {"enabled": True, "initial_scale_power": power}},
                "fp16: initial_scale_power must be between 0 and 127, the exponent of the largest float32, "
                f"got {power}",
            )
            for power in (2000, -1)
        ),
    ],
)
def test_wrong_values_name_path_value_and_expectation(raw, message):
    with pytest.raises(ValueError) as caught:
        parsed(**raw)
    assert str(caught.value) == message


def test_several_wrong_values_come_in_one_error():
    with pytest.raises(ValueError) as caught:
        parsed(fp16={"enabled": "yes", "hysteresis": 0.5}, seed="x")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "fp16.enabled",
        "fp16.hysteresis",
        "seed",
    ]


def test_settings_of_a_dynamic_scale_are_not_checked_where_it_is_not_used():
    assert parsed(fp16={"enabled": True, "loss_scale": 128, "loss_scale_window": 0}).fp16.loss_scale == 128
    assert not parsed(fp16={"enabled": False, "min_loss_scale": 0}).fp16.enabled


def test_the_old_name_of_bf16():
    assert parsed(bfloat16={"enabled": True}).bf16.enabled
    with pytest.raises(ValueError, match=r"bfloat16 = \{\} is the old name of bf16 = \{\}"):
        parsed(bfloat16={}, bf16={})


def test_activation_checkpointing_says_what_has_no_effect():
    switched_off = parsed(activation_checkpointing={"cpu_checkpointing": True})
    assert switched_off.no_effect == {
        "activation_checkpointing.cpu_checkpointing": "activation_checkpointing.blocks is false, "
        "and a model has its own Checkpointer"
    }
    parallel = parsed(activation_checkpointing={"blocks": True, "partition_activations": True, "profile": True})
    assert list(parallel.no_effect) == ["activation_checkpointing.partition_activations"]
    with pytest.raises(ValueError, match="number_checkpoints must be positive, got 0"):
        parsed(activation_checkpointing={"number_checkpoints": 0})
