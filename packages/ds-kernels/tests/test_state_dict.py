"""State goes from torch's optimizers to ours and back, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy

import pytest
import torch
from ds_kernels import Adam, AdamW
from ds_kernels.optim import CpuAdam, FusedAdagrad, FusedLamb, FusedLion, FusedSGD
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


CODED = [
    pytest.param(AdamW, {}, torch.optim.AdamW, id="adamw"),
    pytest.param(CpuAdam, {"adamw_mode": False}, torch.optim.Adam, id="adam"),
    pytest.param(FusedSGD, {"momentum": 0.9}, torch.optim.SGD, id="sgd"),
    pytest.param(FusedAdagrad, {}, torch.optim.Adagrad, id="adagrad"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("kind", "settings", "torch_kind"), CODED)
def test_torch_does_not_take_codes_for_numbers(kind, settings, torch_kind, moments, dtype):
    mine = nn.Parameter(weight().detach().to(dtype))
    ours = kind([mine], lr=0.01, moments=moments, **settings)
    mine.grad = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours.step()
    yours = nn.Parameter(mine.detach().clone())
    theirs = torch_kind([yours], lr=0.01)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    yours.grad = torch.ones_like(yours)
    if moments == "fp32" and dtype == torch.float32:
        theirs.step()
        return
    with pytest.raises((AttributeError, TypeError)):
        theirs.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("kind", "settings", "torch_kind"), CODED)
def test_an_exported_state_goes_on_in_torch(kind, settings, torch_kind, moments, dtype):
    mine = nn.Parameter(weight().detach().to(dtype))
    ours = kind([mine], lr=0.01, moments=moments, **settings)
    gradients = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for gradient in gradients[:3]:
        mine.grad = gradient.clone()
        ours.step()
    yours = nn.Parameter(ours.master(mine).clone())
    theirs = torch_kind([yours], lr=0.01)
    theirs.load_state_dict(ours.torch_state_dict())
    for name in ours.moments:
        assert theirs.state[yours][name].dtype == torch.float32
    mine.grad, yours.grad = gradients[3].clone(), gradients[3].float()
    ours.step()
    theirs.step()
    assert torch.allclose(yours, ours.master(mine), rtol=1e-5, atol=1e-6)


def test_states_saved_under_torchs_names_load(cpu):
    ours = stepped(AdamW([weight()], moments="int8", kernels=cpu), 3)
    [mine] = ours.param_groups[0]["params"]
    old = {**ours.state_dict(), "state": {0: dict(ours.state[mine])}}
    again = AdamW([weight()], moments="int8", kernels=cpu)
    again.load_state_dict(copy.deepcopy(old))
    [param] = again.param_groups[0]["params"]
    assert again.state[param].keys() == ours.state[mine].keys()
    assert all(torch.equal(again.state[param][name], tensor) for name, tensor in ours.state[mine].items())


@pytest.mark.parametrize("kind", [AdamW, FusedLion, FusedSGD, FusedAdagrad])
@pytest.mark.parametrize("other", [AdamW, FusedLion, FusedSGD, FusedAdagrad])
def test_the_state_of_another_class_is_refused(kind, other):
    settings = {FusedSGD: {"momentum": 0.9}}
    saved = stepped(other([weight()], **settings.get(other, {})), 1).state_dict()
    optimizer = stepped(kind([weight()], **settings.get(kind, {})), 1)
    before = copy.deepcopy(optimizer.state_dict())
    if kind is other:
        optimizer.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=rf"index 0, shape \(50,\)\) must be that of {kind.__name__}, with .*; got "):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"][0].keys() == before["state"][0].keys()


@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_the_state_of_another_size_is_refused(moments):
    saved = stepped(FusedLamb([weight()], moments=moments), 1).state_dict()
    optimizer = FusedLamb([("head", nn.Parameter(torch.ones(7, 9)))], moments=moments)
    with pytest.raises(ValueError, match=r"of the parameter 'head' \(group 0, .* must have 63 elements; got 50"):
        optimizer.load_state_dict(saved)
