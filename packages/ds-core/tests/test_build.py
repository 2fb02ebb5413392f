"""What the composition root chooses and refuses; the partitioner is the plain one of these tests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_core import collaborators, initialize, process_group
from ds_core.protocols import BuildContext
from ds_core.registry import MissingPluginError
from torch import nn
from torch.optim import lr_scheduler

from .plain import Plain, Probe

CONFIG = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


@pytest.fixture
def plugins(monkeypatch) -> dict[tuple[str, str], Callable[[], Any]]:
    """The installed plugins, by group and name; the test adds its own."""

    def shard(model, maker, groups):
        return Plain(model, maker.make(groups))

    offered: dict[tuple[str, str], Any] = {("ds.partitioner", "zero"): lambda: SimpleNamespace(shard=shard)}

    def load(group, name):
        if (group, name) not in offered:
            raise MissingPluginError(group, name, ())
        return SimpleNamespace(role_version=1, config_type=None, build=lambda *_: offered[group, name]())

    monkeypatch.setattr(collaborators.registry, "load", load)
    monkeypatch.setattr(
        collaborators.registry,
        "installed",
        lambda group: [SimpleNamespace(name=name) for of, name in offered if of == group],
    )
    return offered


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("optimizer", [None, lambda groups: torch.optim.SGD(groups, lr=0.1)])
@pytest.mark.parametrize(("model", "parameters"), [(Probe(), []), (frozen(Probe()), None)])
def test_an_optimizer_with_nothing_to_train_is_refused(plugins, model, parameters, optimizer):
    config = {"train_batch_size": 1} if optimizer else CONFIG
    with pytest.raises(ValueError, match=r"nothing to train: model_parameters is empty, or no parameter .* gradient"):
        initialize(model, optimizer, config=config, model_parameters=parameters)


def test_a_schedule_that_needs_a_metric_is_refused(plugins):
    with pytest.raises(ValueError, match=r"without arguments, got a ReduceLROnPlateau: .*'metrics'; step that one"):
        initialize(Probe(), config=CONFIG, lr_scheduler=lr_scheduler.ReduceLROnPlateau)


def test_a_schedule_of_torch_is_stepped_without_a_warning(plugins):
    engine, _, _, schedule = initialize(
        Probe(), config=CONFIG, lr_scheduler=lambda optimizer: lr_scheduler.StepLR(optimizer, 1)
    )
    engine.backward(engine(torch.tensor(1.0)))
    engine.step()
    assert schedule.get_last_lr() == [pytest.approx(0.01)]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"bf16": {"enabled": True}}, torch.float32),
        ({"bf16": {"enabled": True, "auto_cast": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True, "auto_cast": True}}, torch.float16),
        ({"bf16": {"enabled": True}, "fp16": {"auto_cast": True}}, torch.float32),
    ],
)
def test_inputs_are_cast_to_what_the_model_computes_in_where_asked(plugins, settings, dtype):
    model = Probe()
    engine = initialize(model, config={**CONFIG, **settings}).engine
    engine(torch.tensor(1.0))
    assert model.seen[0].dtype == dtype


# Kernels #


class Broken:
    """Cannot run."""

    def unusable(self) -> str:
        return "not built"


@pytest.mark.parametrize("offers_reference", [True, False])
def test_a_backend_that_cannot_run_is_told_once_and_replaced_for_all(plugins, caplog, offers_reference):
    plugins["ds.kernels", "cpu"] = Broken
    reference = object()
    if offers_reference:
        plugins["ds.kernels", "reference"] = lambda: reference
    with caplog.at_level(logging.WARNING):
        chosen = collaborators._kernels("auto", BuildContext(device=torch.device("cpu")))
    assert chosen is (reference if offers_reference else None)
    assert len(caplog.records) == 1


# Devices #

GPU = torch.device("cuda", 1)


class OnGpu(nn.Module):
    """Says that it lies on a GPU."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([SimpleNamespace(is_cuda=True, device=GPU)])


@pytest.mark.parametrize(
    ("backend", "model", "local_rank", "device"),
    [
        ("cpu:gloo,cuda:gloo", Probe(), 3, "cpu"),
        ("cpu:gloo,cuda:gloo", OnGpu(), 3, "cuda:1"),
        ("cuda:nccl", Probe(), 3, "cuda:3"),
        ("cpu:gloo,cuda:nccl", Probe(), 3, "cuda:3"),
        ("cuda:nccl", OnGpu(), None, "cuda:1"),
        (None, OnGpu(), None, "cuda:1"),
        (None, Probe(), None, "cuda:0"),
    ],
)
def test_the_device_follows_the_groups_backend(monkeypatch, backend, model, local_rank, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backend)
    launch = None if local_rank is None else SimpleNamespace(local_rank=local_rank)
    monkeypatch.setattr(process_group, "read_launch", lambda: launch)
    group: Any = None if backend is None else object()
    assert process_group.local_device(group, model) == torch.device(device)


@pytest.mark.parametrize(("backend", "device"), [("cuda:nccl", "cuda:1"), ("cpu:gloo,cuda:gloo", "cpu"), (None, "cpu")])
def test_messages_stay_on_the_cpu_where_the_group_takes_them(monkeypatch, backend, device):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backend)
    group: Any = None if backend is None else object()
    assert process_group.message_device(group, GPU) == torch.device(device)
