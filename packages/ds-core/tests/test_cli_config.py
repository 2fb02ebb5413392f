"""``ds config``: what a file comes to."""

import json

import pytest
from click.testing import CliRunner
from ds_core.cli import main


def invoke(*args):
    return CliRunner().invoke(main, ["config", *map(str, args)])


@pytest.fixture
def file(tmp_path):
    def write(**raw):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw))
        return path

    return write


def test_the_effective_configuration_is_printed_as_json(file):
    result = invoke("check", file(train_batch_size=8, bf16={"enabled": True}), "--world-size", 2)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["bf16"] == {"enabled": True, "auto_cast": False, "check_grad_overflow": True}
    assert values["gradient_clipping"] == 1.0
    assert values["data_types"] == {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": []}
    assert values["activation_checkpointing"]["number_checkpoints"] == 8
    assert result.stderr == ""


def test_no_default_of_ours_is_left_open(file):
    values = json.loads(invoke("check", file(train_batch_size=8)).stdout)
    sections = [section for section in values.values() if isinstance(section, dict)]
    assert sections
    assert all(value is not None for section in (values, *sections) for value in section.values())


def test_choices_and_keys_without_effect_are_explained_beside_it(file):
    result = invoke("check", file(train_batch_size=8, seed="auto", prescale_gradients=True))
    json.loads(result.stdout)
    assert "seed = 1234" in result.stderr
    assert "prescale_gradients: gradients are summed in float32" in result.stderr


def test_an_error_exits_with_one_and_says_what_is_wrong(file):
    result = invoke("check", file(train_batch_size=9, fp16={"enabled": True}), "--world-size", 4)
    assert result.exit_code == 1
    assert "with --world-size 4" in result.stderr
    assert "train_batch_size 9 must be a multiple of 4" in result.stderr
    assert result.stdout == ""


def test_broken_json_exits_with_one(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    result = invoke("check", path)
    assert result.exit_code == 1
    assert "is no valid JSON" in result.stderr


def test_a_schedule_for_an_optimizer_object_passes(file):
    assert invoke("check", file(train_batch_size=8, scheduler={"type": "WarmupLR"})).exit_code == 0


def test_the_schema_is_printed_as_json():
    result = invoke("schema")
    assert result.exit_code == 0
    assert "train_batch_size" in json.loads(result.stdout)["properties"]
