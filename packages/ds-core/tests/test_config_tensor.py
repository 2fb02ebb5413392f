"""The section of tensor parallelism, as DeepSpeed's files and ours have it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from ds_core.axes import make_axes
from ds_core.config import num_tensor_ranks, parse
from ds_core.config.tensor import as_one_size, without_idle

SIZES = {"train_batch_size": 8}


@dataclass(frozen=True, kw_only=True)
class Rule:
    patterns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    autotp_size: int = 1
    blocks: int | None = None
    preset_model: str | None = None
    rules: tuple[Rule, ...] = ()


def load(group, name):
    assert (group, name) == ("ds.tensor", "tensor")
    return SimpleNamespace(role_version=1, config_type=Settings)


@pytest.mark.parametrize(
    "section",
    [
        {"autotp_size": 4},
        {"tp_size": 4},
        {"enabled": True, "tp_size": 4},
        {"tp": {"tp_size": 4}},
        {"tensor_parallel": {"tp_size": 4}},
        {"autotp_size": 0, "tp": {"tp_size": 4, "tp_grain_size": 8}},
        {"autotp_size": "auto", "tp": {"tp_size": 4, "mpu": None}, "preset_model": "auto"},
    ],
)
def test_all_spellings_of_the_number_of_ranks_are_one(section):
    raw = {**SIZES, "tensor_parallel": section}
    assert num_tensor_ranks(raw) == 4
    config = parse(raw, 2, load)
    assert config.plugins["tensor_parallel"].config == Settings(autotp_size=4)
    assert config.train_micro_batch_size_per_gpu == 4  # data-parallel ranks count, and no others
    assert set(config.no_effect) <= {"tensor_parallel.tp.tp_grain_size", "tensor_parallel.tp.mpu"}


@pytest.mark.parametrize(
    "section",
    [
        {"autotp_size": 0},
        {"enabled": False, "tp_size": 1},
        {"enabled": False},
        {"enabled": True, "tp_size": 1},
        {"enabled": True, "tp": {"tp_size": 1}},
        {"enabled": "auto", "autotp_size": 0},
        {"autotp_size": 1, "tp": {"tp_size": 1}},
        {"blocks": 1},
        {"tp": {"tp_size": "auto"}},
    ],
)
def test_a_section_that_splits_nothing_selects_nothing(section):
    raw = {**SIZES, "tensor_parallel": {**section, "preset_model": "llama"}}
    assert num_tensor_ranks(raw) == 1
    config = parse(raw, 1, load)
    assert not config.plugins
    assert config.no_effect["tensor_parallel.preset_model"] == "the feature is off"


@pytest.mark.parametrize("section", [{}, {"enabled": False}, {"dtype": "bf16"}, {"tp": {"tp_grain_size": 8}}])
def test_a_section_that_asks_for_nothing_needs_no_size(section):
    raw = {**SIZES, "tensor_parallel": section}
    assert num_tensor_ranks(raw) == 1
    assert not parse(raw, 1, load).plugins


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preset_model": "llama"}, "tensor_parallel.preset_model = 'llama' and no number of ranks: say over how many"),
        ({"enabled": True, "preset_model": "lama"}, "tensor_parallel.enabled = True and no number of ranks: say"),
        ({"tpsize": 2}, "tensor_parallel.tpsize = 2 and no number of ranks; did you mean 'tp_size'?: say over how"),
        ({"autotp": 2}, "tensor_parallel.autotp = 2 and no number of ranks; did you mean 'autotp_size'?"),
        ({"size": 2}, "tensor_parallel.size = 2 and no number of ranks"),
        ({"enabled": False, "tp_size": 2}, "tensor_parallel.enabled is false, and tensor_parallel.tp_size asks for"),
        ({"enabled": False, "blocks": 2}, "tensor_parallel.enabled is false, and tensor_parallel.blocks asks for"),
        ({"enabled": "yes", "tp_size": 2}, "tensor_parallel.enabled must be true or false; got 'yes'"),
    ],
)
def test_a_model_is_never_left_whole_in_silence(section, message):
    raw = {**SIZES, "tensor_parallel": section}
    for read in (num_tensor_ranks, lambda raw: parse(raw, 1, load)):
        with pytest.raises(ValueError) as caught:
            read(raw)
        assert message in str(caught.value)


def test_blocks_alone_split_a_model_on_one_rank():
    for switch in ({}, {"enabled": True}, {"enabled": "auto"}):
        config = parse({**SIZES, "tensor_parallel": {"autotp_size": 1, "blocks": 4, **switch}}, 1, load)
        assert config.plugins["tensor_parallel"].config == Settings(blocks=4)


@pytest.mark.parametrize("size", [True, "two", 0.5, -1])
def test_a_size_is_a_number_of_ranks(size):
    with pytest.raises(ValueError, match=r"tensor_parallel.autotp_size must be a positive number of ranks"):
        num_tensor_ranks({"tensor_parallel": {"autotp_size": size}})


def test_two_sizes_are_refused():
    raw = {"tensor_parallel": {"autotp_size": 2, "tensor_parallel": {"tp_size": 4}}}
    with pytest.raises(ValueError, match=r"autotp_size = 2 and tensor_parallel.tensor_parallel.tp_size = 4 each say"):
        as_one_size(raw)


def test_unknown_keys_are_found_in_rows_and_in_what_is_nested():
    for section, path in (
        ({"autotp_size": 2, "rules": [{"patterns": ["a"]}, {"patterns": ["b"], "pattern": 1}]}, "rules[1].pattern"),
        ({"tp": {"tp_size": 2, "tp_sise": 2}}, "tp.tp_sise"),
        ({"autotp_size": 2, "preset": "llama"}, "preset"),
    ):
        with pytest.raises(ValueError) as caught:
            parse({**SIZES, "tensor_parallel": section}, 1, load)
        assert f"unknown key tensor_parallel.{path} " in str(caught.value)


def test_a_section_of_another_kind_is_left_to_the_check():
    assert as_one_size({"tensor_parallel": 2}) == {"tensor_parallel": 2}
    assert without_idle({"tensor_parallel": 2}, {}) == {"tensor_parallel": 2}
    with pytest.raises(ValueError, match="tensor_parallel must be an object"):
        parse({**SIZES, "tensor_parallel": 2}, 1, load)


def test_one_process_is_no_mesh():
    with pytest.raises(ValueError, match=r"a model over 2 ranks \(1 stages, each layer split over 2\): 1 ranks"):
        make_axes(None, 1, "cpu", 2)
