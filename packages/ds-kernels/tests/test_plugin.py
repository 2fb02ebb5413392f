"""The plugins build what their settings say, and the maker steps shards as the optimizer steps parameters."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import pytest
import torch
from ds_kernels import Adam, AdamConfig, AdamMaker, AdamW, ReferenceBackend
from ds_kernels import plugin as plugins
from ds_kernels.config import LionConfig
from torch import Tensor, nn


class Shard(NamedTuple):
    """As a partitioner hands it over."""

    master: nn.Parameter
    grad: Tensor
    copy: Tensor | None


class Context(NamedTuple):
    """What the plugins read of a build context."""

    kernels: ReferenceBackend | None = None


def shards(lengths, dtype=torch.bfloat16, copies=True) -> list[Shard]:
    return [
        Shard(
            nn.Parameter(torch.randn(n)),
            torch.randn(n).to(dtype),
            torch.zeros(n, dtype=torch.bfloat16) if copies else None,
        )
        for n in lengths
    ]


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_update_scales_steps_and_copies(backend, adam_w_mode):
    maker = AdamMaker(AdamConfig(lr=0.1, weight_decay=0.1, adam_w_mode=adam_w_mode), kernels=backend)
    mine = shards([5, 40, 17])
    peers = [nn.Parameter(shard.master.detach().clone()) for shard in mine]
    optimizer = maker.make([{"params": [shard.master for shard in mine]}])
    peer = (AdamW if adam_w_mode else Adam)(peers, lr=0.1, weight_decay=0.1, kernels=backend)
    for _ in range(5):
        for shard, param in zip(mine, peers):
            param.grad = shard.grad.float() * 0.5
        peer.step()
        assert list(maker.update(optimizer, [mine[:2], mine[2:]], 0.5)) == [0, 1]
        for shard, param in zip(mine, peers):
            assert torch.equal(shard.master, param)
            assert torch.equal(shard.copy, param.bfloat16())
    assert optimizer.state[mine[0].master]["step"] == 5


def test_a_unit_stands_when_its_index_comes():
    maker = AdamMaker(AdamConfig(lr=0.1), kernels=ReferenceBackend())
    mine = shards([4, 4])
    before = [shard.master.detach().clone() for shard in mine]
    optimizer = maker.make([{"params": [shard.master for shard in mine]}])
    update = maker.update(optimizer, [[mine[0]], [], [mine[1]]], 1.0)
    assert next(update) == 0
    assert not torch.equal(mine[0].master, before[0])
    assert torch.equal(mine[1].master, before[1])
    assert list(update) == [1, 2]
    assert not torch.equal(mine[1].master, before[1])


def test_groups_settings_win_and_are_followed_when_set_later():
    maker = AdamMaker(AdamConfig(lr=0.1, weight_decay=0.0), kernels=ReferenceBackend())
    fast, slow = shards([1, 1], torch.float32, copies=False)
    optimizer = maker.make([{"params": [fast.master]}, {"params": [slow.master], "lr": 0.01}])
    before = fast.master.item(), slow.master.item()
    optimizer.param_groups[0]["lr"] = 0.2
    list(maker.update(optimizer, [[fast, slow]], 1.0))
    assert abs(fast.master.item() - before[0]) == pytest.approx(0.2, rel=1e-4)
    assert abs(slow.master.item() - before[1]) == pytest.approx(0.01, rel=1e-4)


def test_a_foreign_master_is_refused():
    maker = AdamMaker(AdamConfig())
    mine, foreign = shards([3, 7])
    optimizer = maker.make([{"params": [mine.master]}])
    with pytest.raises(ValueError, match="got one of 7 elements in unit 1 that is not"):
        list(maker.update(optimizer, [[mine], [foreign]], 1.0))


@pytest.mark.parametrize(
    ("plugin", "adam_w_mode", "kind"),
    [
        (plugins.adamw, True, AdamW),
        (plugins.adam, True, AdamW),
        (plugins.adam, False, Adam),
    ],
)
def test_types_mean_what_they_mean_in_deepspeed(plugin, adam_w_mode, kind, caplog):
    maker = plugin.build(plugin.config_type(lr=0.5, adam_w_mode=adam_w_mode), Context())
    optimizer = maker.make([{"params": [torch.zeros(2)]}])
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["weight_decay"] == 0.0
    assert not caplog.records


def test_adamw_stays_adamw_and_says_so(caplog):
    maker = plugins.adamw.build(AdamConfig(adam_w_mode=False), Context())
    assert type(maker.make([{"params": [torch.zeros(2)]}])) is AdamW
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "adam_w_mode=False has no effect" in record.message


def test_a_setting_without_effect_is_reported(caplog):
    plugins.adam.build(AdamConfig(set_grad_none=False), Context())
    assert "set_grad_none=False has no effect" in caplog.text


def test_the_contexts_kernels_are_used(monkeypatch):
    class Recorder(ReferenceBackend):
        calls = 0

        def adamw(self, *args, **kwargs):
            Recorder.calls += 1

    maker = plugins.adam.build(AdamConfig(), Context(kernels=Recorder()))
    [shard] = shards([3])
    list(maker.update(maker.make([{"params": [shard.master]}]), [[shard]], 1.0))
    assert Recorder.calls == 1


@pytest.mark.parametrize("plugin", [plugins.adam, plugins.adamw, plugins.lion, plugins.cpu, plugins.reference])
def test_plugins_speak_version_1_of_their_role(plugin):
    assert plugin.role_version == 1


def test_lion_steps_shards(caplog):
    maker = plugins.lion.build(LionConfig(lr=0.25, set_grad_none=False), Context())
    assert "set_grad_none=False has no effect" in caplog.text
    [shard] = shards([5])
    before = shard.master.detach().clone()
    optimizer = maker.make([{"params": [shard.master]}])
    assert optimizer.param_groups[0]["update_kind"] == "elementwise"
    list(maker.update(optimizer, [[shard]], 1.0))
    assert torch.equal(shard.master, before - 0.25 * shard.grad.sign())
    with pytest.raises(ValueError, match="fp32_optimizer_states must be true"):
        LionConfig(fp32_optimizer_states=False)


def test_kernel_plugins_build_their_backends():
    assert plugins.cpu.build(None, Context()).name == "cpu"
    assert plugins.reference.build(None, Context()).name == "reference"


def test_settings_are_frozen_and_take_no_positions():
    config = AdamConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(TypeError):
        AdamConfig(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amsgrad": True}, "amsgrad must be false"),
        ({"fp32_optimizer_states": False}, "fp32_optimizer_states must be true"),
        ({"lr": -1.0}, "lr must be at least 0; got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\); got \(0.9, 1.0\)"),
        ({"weight_decay": -0.5}, "weight_decay must be at least 0; got -0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamConfig(**settings)
