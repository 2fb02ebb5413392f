"""State that is moved away, reached and saved through the engine: what the engine makes of the names it is given."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
import torch

from .plain import Probe, engine_of


class OffloadState(str, Enum):
    """As DeepSpeed's enumeration is written."""

    OPTIMIZER = "optim_states"
    MASTERS = "hp_params"
    BUFFER = "contiguous_grad_buffer"


@pytest.mark.parametrize(
    ("include", "kinds"),
    [
        (None, ["params", "masters", "optimizer", "gradients"]),
        (["lp_params", "hp_params", "optim_states", "lp_grads"], ["params", "masters", "optimizer", "gradients"]),
        (["gradients", "hp_params", "masters"], ["gradients", "masters"]),
        ([OffloadState.OPTIMIZER, OffloadState.MASTERS, OffloadState.BUFFER], ["optimizer", "masters"]),
        ({"contiguous_grad_buffer"}, []),
        ((), []),
    ],
)
def test_states_go_by_two_names(include: Any, kinds: list[str]) -> None:
    engine, sharded = engine_of(Probe())
    freed = engine.offload_states(include)
    assert list(freed) == kinds == list(sharded.parking.away)
    assert engine.reload_states() == sum(freed.values())
    assert not sharded.parking.away


def test_the_signatures_are_deepspeeds() -> None:
    engine, sharded = engine_of(Probe())
    engine.offload_states(None, "cpu", False, True)
    engine.offload_states(pin_memory=True, non_blocking=True)
    engine.reload_states(non_blocking=True)
    assert sharded.parking.pinned == [False, True]
    assert engine.save_16bit_model("folder", "weights.safetensors", True) is True
    assert engine.save_16bit_model("folder", exclude_frozen_parameters=False) is True
    assert sharded.weights.saved == [("folder", "weights.safetensors", False), ("folder", "model.safetensors", True)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": ["params", "fp32", "grads"]},
            "no states 'fp32', 'grads'; there are params, masters, optimizer, gradients, and by DeepSpeed's names "
            "lp_params, hp_params, optim_states, lp_grads, contiguous_grad_buffer",
        ),
        ({"device": "nvme"}, "states are moved to host memory, device='cpu', got 'nvme'"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_moves(settings: dict[str, Any], message: str) -> None:
    engine, sharded = engine_of(Probe())
    with pytest.raises(ValueError, match=message):
        engine.offload_states(**settings)
    assert not sharded.parking.away


def test_values_are_within_reach() -> None:
    model = Probe()
    engine, sharded = engine_of(model)
    assert engine.access is sharded.access
    engine.access.set_full_param("weight", torch.tensor(3.0))
    assert model.weight.item() == 3.0
    assert engine.module_state_dict() == {"weight": torch.tensor(3.0)}
    model.weight.requires_grad_(requires_grad=False)
    assert engine.module_state_dict(exclude_frozen_parameters=True) == {}
