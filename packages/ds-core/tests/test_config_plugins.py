"""Sections that select plugins, and the optimizer and schedule that a file names."""

from dataclasses import dataclass, field

import pytest
from ds_core.config import parse
from ds_core.registry import MissingPluginError
from ds_core.schedules import OneCycle


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    stage: int = 0
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.stage > 3:
            raise ValueError(f"stage must be at most 3, got {self.stage}")


@dataclass(frozen=True)
class FakePlugin:
    config_type: type | None
    role_version: int = 1

    def build(self, config, context):
        return config, context


class Plugins:
    """Loads from a dictionary, and remembers what was asked for."""

    def __init__(self, **known):
        self.known = known
        self.asked = []

    def __call__(self, group, name):
        self.asked.append((group, name))
        if name not in self.known:
            raise MissingPluginError(group, name, tuple(self.known))
        return self.known[name]


def parsed(load, **raw):
    return parse({"train_batch_size": 8, **raw}, 1, load)


def test_the_partitioners_section_becomes_its_own_dataclass():
    load = Plugins(zero=FakePlugin(Settings))
    config = parsed(load, zero_optimization={"stage": 2, "names": ["Block"], "inner": {"depth": 3}})
    choice = config.plugins["partitioner"]
    assert (choice.name, choice.plugin) == ("zero", load.known["zero"])
    assert choice.config == Settings(stage=2, names=("Block",), inner=Inner(depth=3))
    assert load.asked == [("ds.partitioner", "zero")]


def test_keys_without_effect_are_gone_before_the_plugin_looks():
    load = Plugins(zero=FakePlugin(Settings))
    config = parsed(load, zero_optimization={"stage": 3, "stage3_max_live_parameters": 1e9})
    assert config.plugins["partitioner"].config == Settings(stage=3)
    assert list(config.no_effect) == ["zero_optimization.stage3_max_live_parameters"]


@pytest.mark.parametrize(("old", "stage"), [(True, 1), (False, 0)])
def test_the_old_form_of_the_partitioners_section(old, stage):
    config = parsed(Plugins(zero=FakePlugin(Settings)), zero_optimization=old)
    assert config.plugins["partitioner"].config.stage == stage


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stag": 1}, "unknown key zero_optimization.stag = 1; did you mean 'zero_optimization.stage'?"),
        (
            {"overlap_com": True},
            "unknown key zero_optimization.overlap_com = True; did you mean 'zero_optimization.overlap_comm'? "
            "It has no effect: communication always overlaps with computation",
        ),
        (
            {"inner": {"dept": 1}},
            "unknown key zero_optimization.inner.dept = 1; did you mean 'zero_optimization.inner.depth'?",
        ),
        ({"stage": "3"}, "zero_optimization.stage: got '3' (write it without quotes), must be a valid integer"),
        ({"stage": "two"}, "zero_optimization.stage: got 'two', must be a valid integer"),
        ({"inner": {"depth": []}}, "zero_optimization.inner.depth: got [], must be a valid integer"),
        ({"names": ["a", 1]}, "zero_optimization.names[1]: got 1, must be a valid string"),
        ({"stage": 4}, "zero_optimization: stage must be at most 3, got 4"),
        ([], "zero_optimization must be an object {...}; got []"),
    ],
)
def test_errors_in_a_plugins_section_name_path_value_and_expectation(section, message):
    with pytest.raises(ValueError) as caught:
        parsed(Plugins(zero=FakePlugin(Settings)), zero_optimization=section)
    assert str(caught.value) == message


@pytest.mark.parametrize("role", ["partitioner", "collectives"])
def test_a_section_named_after_a_role_selects_any_plugin(role):
    load = Plugins(mine=FakePlugin(Settings))
    config = parsed(load, **{role: {"name": "mine", "stage": 1}})
    assert config.plugins[role].config == Settings(stage=1)
    assert load.asked == [(f"ds.{role}", "mine")]


@pytest.mark.parametrize("role", ["store", "attention", "monitor"])
def test_a_role_that_is_not_composed_is_refused_unless_it_is_off(role):
    load = Plugins(mine=FakePlugin(Settings))
    with pytest.raises(ValueError, match=rf"{role}.* asks for composing a plugin of the group 'ds.{role}', which this"):
        parsed(load, **{role: {"name": "mine"}})
    assert load.asked == []
    assert parsed(load, **{role: {}}).plugins == {}


def test_auto_in_such_a_section_is_left_to_the_plugin():
    config = parsed(Plugins(mine=FakePlugin(Settings)), collectives={"name": "mine", "names": ["auto"]})
    assert config.plugins["collectives"].config.names == ("auto",)


def test_such_a_section_must_name_its_plugin():
    with pytest.raises(ValueError, match=r"collectives must name its plugin: .*; got \{'stage': 1\}"):
        parsed(Plugins(), collectives={"stage": 1})


def test_deepspeeds_pipeline_section_selects_nothing_where_it_asks_for_nothing():
    section = {"stages": "auto", "partition": "best", "seed_layers": False, "activation_checkpoint_interval": 0}
    assert parsed(Plugins(), pipeline=section).plugins == {}
    assert parsed(Plugins(), pipeline={"stages": 1}).plugins == {}


def test_a_pipeline_needs_no_name():
    load = Plugins(pipe=FakePlugin(Settings), mine=FakePlugin(Settings))
    chosen = parsed(load, pipeline={"stage": 3, "partition": "best"}).plugins["pipeline"]
    assert (chosen.name, chosen.config) == ("pipe", Settings(stage=3))
    for open_ in (None, "auto"):
        chosen = parsed(load, pipeline={"stage": 3, "activation_checkpoint_interval": open_}).plugins["pipeline"]
        assert chosen.config == Settings(stage=3)
    assert parsed(load, pipeline={"name": "mine"}).plugins["pipeline"].name == "mine"
    with pytest.raises(ValueError, match="stagse"):
        parsed(load, pipeline={"stagse": 4})
    with pytest.raises(ValueError, match=r"did you mean 'pipeline.partition'\? It has no effect: a PipelineModule is"):
        parsed(load, pipeline={"partition_method": "uniform"})
    for value in (1, 0):  # neither is the value at which that key asks for nothing
        with pytest.raises(ValueError, match=r"unknown key pipeline\.chunks"):
            parsed(load, pipeline={"chunks": value})


def test_a_plugin_without_settings_takes_none():
    load = Plugins(bare=FakePlugin(None))
    assert parsed(load, collectives={"name": "bare"}).plugins["collectives"].config is None
    with pytest.raises(ValueError, match=r"the plugin 'bare' has no settings, but collectives = \{'path': 'x'\}"):
        parsed(load, collectives={"name": "bare", "path": "x"})


def test_the_partitioner_is_selected_once():
    with pytest.raises(ValueError, match=r"both zero_optimization = \{\} and partitioner = .* keep one"):
        parsed(Plugins(zero=FakePlugin(Settings)), zero_optimization={}, partitioner={"name": "zero"})


def test_a_missing_plugin_names_its_wheel():
    with pytest.raises(ValueError, match=r"'zero' in the group 'ds.partitioner'.*pip install ds-zero"):
        parsed(Plugins(), zero_optimization={"stage": 1})


# The optimizer #


@pytest.mark.parametrize("spelling", ["AdamW", "adamw", "ADAMW"])
def test_an_installed_optimizer_plugin_is_preferred(spelling):
    load = Plugins(AdamW=FakePlugin(Settings))
    config = parsed(load, optimizer={"type": spelling, "params": {"stage": 1}})
    assert config.optimizer.config == Settings(stage=1)
    assert (config.optimizer.name, config.optimizer.plugin) == ("AdamW", load.known["AdamW"])
    assert config.chosen == {}


def test_torch_adam_asks_for_torchs_class():
    load = Plugins(AdamW=FakePlugin(Settings))
    config = parsed(load, optimizer={"type": "AdamW", "params": {"torch_adam": True, "lr": 0.1}})
    assert config.optimizer.plugin.name == "torch.optim.AdamW"
    assert load.asked == []
    assert config.chosen == {}


def test_without_a_plugin_torchs_class_is_used_and_said():
    config = parsed(Plugins(), optimizer={"type": "AdamW", "params": {"lr": 0.1}})
    assert config.optimizer.plugin.name == "torch.optim.AdamW"
    assert config.chosen == {
        "optimizer.type": "torch.optim, because no installed plugin of the group 'ds.optimizer' has that name"
    }


def test_an_error_of_the_plugin_is_no_reason_to_fall_back():
    with pytest.raises(ValueError, match=r"unknown key optimizer.params.lrr = 0.1"):
        parsed(Plugins(AdamW=FakePlugin(Settings)), optimizer={"type": "AdamW", "params": {"lrr": 0.1}})


def test_an_unknown_optimizer_lists_plugins_and_torchs_classes():
    with pytest.raises(ValueError) as caught:
        parsed(Plugins(Lion=FakePlugin(None)), optimizer={"type": "Lyon"})
    assert str(caught.value).startswith("optimizer.type = 'Lyon' is neither an installed plugin (Lion) nor")
    assert str(caught.value).endswith("RMSprop, Rprop, SGD; did you mean 'Lion'?")


# The schedule #


def test_the_schedule_is_a_value():
    config = parsed(
        Plugins(),
        optimizer={"type": "SGD"},
        scheduler={"type": "OneCycle", "params": {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": 1}},
    )
    assert config.scheduler == OneCycle(cycle_min_lr=(0.1, 0.2), cycle_max_lr=1.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"type": "WarmupRL"},
            "scheduler.type = 'WarmupRL' is none of WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest; "
            "pass any other schedule, such as one of torch.optim.lr_scheduler, as an object; did you mean 'WarmupLR'?",
        ),
        (
            {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1}},
            "scheduler.params.total_num_steps is missing, and has no default",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_num_step": 1}},
            "unknown key scheduler.params.warmup_num_step = 1; did you mean 'scheduler.params.warmup_num_steps'?",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_max_lr": "x"}},
            "scheduler.params.warmup_max_lr: got 'x', must be a valid number or a valid array",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_max_lr": "0.1"}},
            "scheduler.params.warmup_max_lr: got '0.1' (write it without quotes), must be a valid number or a "
            "valid array",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_type": "exp"}},
            "scheduler.params.warmup_type: got 'exp', must be 'log' or 'linear'",
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_num_steps": 0}},
            "scheduler.params: warmup_num_steps must be a positive whole number, got 0",
        ),
    ],
)
def test_errors_in_a_schedule_name_path_value_and_expectation(section, message):
    with pytest.raises(ValueError) as caught:
        parsed(Plugins(), optimizer={"type": "SGD"}, scheduler=section)
    assert str(caught.value) == message
