"""Where a configuration can come from."""

import base64
import json

import numpy as np
import pytest
from ds_core.config import read

VALUE = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}}
TEXT = json.dumps(VALUE)


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_all_sources_give_the_same_values(tmp_path, as_path):
    file = tmp_path / "config.json"
    file.write_text(TEXT)
    encoded = base64.urlsafe_b64encode(TEXT.encode()).decode()
    assert read(VALUE) == read(TEXT) == read(encoded) == read(as_path(file)) == VALUE


def test_long_base64_is_not_taken_for_a_path():
    value = {"comment": "x" * 10_000}
    assert read(base64.urlsafe_b64encode(json.dumps(value).encode()).decode()) == value


def test_a_dictionary_is_copied():
    source = {"fp16": {"enabled": True}}
    result = read(source)
    result["fp16"]["enabled"] = False
    assert source == {"fp16": {"enabled": True}}


def test_numbers_of_numpy_become_numbers():
    result = read({"train_batch_size": np.int64(8), "gradient_clipping": np.float32(0.5), "betas": (0.9, 1)})
    assert result == {"train_batch_size": 8, "gradient_clipping": 0.5, "betas": [0.9, 1]}
    assert json.loads(json.dumps(result)) == result


def test_infinity_is_a_number():
    assert read('{"steps_per_print": Infinity}') == {"steps_per_print": float("inf")}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"s": {"a": 1, "b": 0, "a": 2}}'])
def test_duplicate_keys_are_errors(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    for source in (text, file):
        with pytest.raises(ValueError, match=r"'a' stands twice in one JSON object, as 1 and as 2"):
            read(source)


@pytest.mark.parametrize("source", [None, 8, [VALUE]])
def test_what_is_no_configuration_is_told_with_the_forms_of_one(source):
    with pytest.raises(ValueError) as caught:
        read(source)
    assert str(caught.value) == (
        f"a configuration is required: a dictionary, the path of a JSON file, JSON text or base64 of it; got {source!r}"
    )


def test_missing_file_names_the_path():
    with pytest.raises(ValueError, match=r"got 'no/such/file.json', .* no such file exists"):
        read("no/such/file.json")


def test_invalid_json_names_the_file_and_the_place(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text('{"a": }')
    with pytest.raises(ValueError, match=r"broken.json is no valid JSON: .*column 7"):
        read(file)


def test_an_array_is_no_configuration(tmp_path):
    file = tmp_path / "array.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold a JSON object \{...\}, got \[1\]"):
        read(file)


def test_values_that_are_not_json_are_named():
    with pytest.raises(ValueError, match=r"fp16.enabled must be a JSON value, got <object .* of type object"):
        read({"fp16": {"enabled": object()}})
    with pytest.raises(ValueError, match=r"keys must be strings, got 1 in fp16"):
        read({"fp16": {1: True}})
