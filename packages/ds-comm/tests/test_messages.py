"""Which groups have messages of our own, and where small messages lie."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ds_comm import messages


@pytest.mark.parametrize(
    ("config", "device_type", "posted"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", True),
        ("cpu:gloo,cuda:gloo", "cuda", False),  # a plain gloo group; gloo sends from the CPU's memory only
        ("cpu:gloo,cuda:nccl", "cpu", True),
        ("cpu:gloo,cuda:nccl", "cuda", False),
        ("cuda:nccl", "cuda", False),
        ("cpu:ds_shm", "cpu", False),
        ("cpu:mpi,cuda:mpi", "cpu", False),
    ],
)
def test_messages_are_posted_over_gloo_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch, config: str, device_type: str, posted: bool
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(messages, "_Posted", lambda received, group: "posted")
    monkeypatch.setattr(messages, "_Collective", lambda received, group: "collective")
    exchange: object = messages.exchanges(None, device_type)(torch.empty(1, 0))
    assert exchange == ("posted" if posted else "collective")


@pytest.mark.parametrize(
    ("config", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:gloo,cpu:gloo", "cpu"), ("cuda:nccl", "cuda")]
)
def test_small_messages_lie_where_the_group_takes_them(
    monkeypatch: pytest.MonkeyPatch, config: str, device: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert messages.device_of(None) == torch.device(device)
