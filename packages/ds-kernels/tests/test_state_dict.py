"""State goes from torch's optimizers to ours and back, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy

import pytest
import torch
from ds_kernels import Adam, AdamW
from torch import nn


def stepped(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    for step in range(steps):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                generator = torch.Generator().manual_seed(step)
                weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return optimizer


def weight() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 50))


def test_state_is_named_and_typed_as_torchs():
    ours = stepped(AdamW([weight()]), 3).state_dict()["state"][0]
    theirs = stepped(torch.optim.AdamW([weight()]), 3).state_dict()["state"][0]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
    assert ours["step"] == 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "torch_kind"), [(AdamW, torch.optim.AdamW), (Adam, torch.optim.Adam)])
def test_torchs_state_goes_on_here(kind, torch_kind, fused):
    theirs = stepped(torch_kind([weight()], lr=0.1, weight_decay=0.2, fused=fused), 3)
    mine = nn.Parameter(theirs.param_groups[0]["params"][0].detach().clone())
    ours = kind([mine])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.1
    stepped(ours, 2)
    stepped(theirs, 2)
    assert torch.allclose(mine, theirs.param_groups[0]["params"][0], rtol=1e-6, atol=1e-7)
    assert ours.state[mine]["step"] == 5


@pytest.mark.parametrize(("kind", "torch_kind"), [(AdamW, torch.optim.AdamW), (Adam, torch.optim.Adam)])
def test_our_state_goes_on_in_torch(kind, torch_kind):
    ours = stepped(kind([weight()], lr=0.1, weight_decay=0.2), 3)
    yours = nn.Parameter(ours.param_groups[0]["params"][0].detach().clone())
    theirs = torch_kind([yours])
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert theirs.param_groups[0]["weight_decay"] == 0.2
    stepped(ours, 2)
    stepped(theirs, 2)
    assert torch.allclose(yours, ours.param_groups[0]["params"][0], rtol=1e-6, atol=1e-7)


def test_the_class_decides_on_decoupling():
    state = torch.optim.Adam([weight()]).state_dict()
    optimizer = AdamW([weight()])
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_variants_not_offered_are_refused(name):
    state = torch.optim.AdamW([weight()], **{name: True}).state_dict()
    with pytest.raises(ValueError, match=f"{name} must be false"):
        AdamW([weight()]).load_state_dict(state)
