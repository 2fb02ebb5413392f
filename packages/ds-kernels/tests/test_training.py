"""The optimizers train as torch's do, and behave as torch optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
from ds_kernels import Adam, AdamW, CpuBackend, ReferenceBackend, use_backend
from torch import nn

KINDS = [pytest.param(AdamW, torch.optim.AdamW, id="adamw"), pytest.param(Adam, torch.optim.Adam, id="adam")]


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 7, generator=generator), torch.randn(16, 3, generator=generator)
    return nn.functional.mse_loss(net(x), y)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(ours: nn.Module, theirs: nn.Module) -> bool:
    # A step moves a parameter by about lr, in which two units of rounding are 2**-22 of it: 10 steps of 1e-2.
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=10 * 1e-2 * 2**-20) for a, b in pairs)


@pytest.mark.parametrize(("kind", "torch_kind"), KINDS)
def test_training_follows_torch_step_by_step(backend, kind, torch_kind):
    ours, theirs = model(), model()
    optimizer = kind(ours.parameters(), lr=1e-2, weight_decay=0.1, kernels=backend)
    peer = torch_kind(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(10):
        our_loss, their_loss = train(ours, optimizer, [step]), train(theirs, peer, [step])
        assert our_loss == pytest.approx(their_loss, rel=1e-5)
        assert close(ours, theirs)


def test_defaults_are_torchs():
    for kind, torch_kind in ((AdamW, torch.optim.AdamW), (Adam, torch.optim.Adam)):
        ours, theirs = kind([torch.zeros(1)]).defaults, torch_kind([torch.zeros(1)]).defaults
        for name in ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"):
            assert ours[name] == theirs[name]


def test_without_bias_correction(backend):
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    optimizer = AdamW([weight], lr=1.0, betas=(0.9, 0.99), eps=0.0, bias_correction=False, kernels=backend)
    optimizer.step()
    # m / sqrt(v) = 0.1 / sqrt(0.01)
    assert torch.allclose(weight, torch.full((4,), -1.0))


def test_groups_have_their_own_settings():
    decayed, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}]
    optimizer = AdamW(groups, lr=0.1, weight_decay=0.0)
    decayed.grad, plain.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(decayed, torch.full((3,), 0.95))
    assert torch.equal(plain, torch.ones(3))


def test_a_parameter_without_gradient_is_left_out():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = AdamW([used, unused])
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert list(optimizer.state) == [used]


def test_the_closure_is_run_with_gradients_and_its_loss_returned():
    net = model()
    optimizer = AdamW(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second.item() < first.item()


def test_schedulers_set_the_learning_rate():
    weight = nn.Parameter(torch.ones(1))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    moves = []
    for _ in range(3):
        weight.grad = torch.ones(1)
        before = weight.item()
        optimizer.step()
        scheduler.step()
        moves.append(before - weight.item())
    assert moves == pytest.approx([0.1, 0.05, 0.025], rel=1e-5)


def test_a_learning_rate_may_be_a_tensor():
    one, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    for weight, lr in ((one, 0.25), (other, torch.tensor(0.25))):
        weight.grad = torch.ones(5)
        AdamW([weight], lr=lr).step()
    assert torch.equal(one, other)


def test_the_process_choice_is_followed_at_each_step(monkeypatch):
    ran = []
    monkeypatch.setattr(ReferenceBackend, "adamw", lambda *args, **kwargs: ran.append("reference"))
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = AdamW([weight])
    with use_backend("reference"):
        optimizer.step()
    assert ran == ["reference"]
    if CpuBackend().unusable() is None:
        optimizer.step()
        assert ran == ["reference"]


def test_a_backward_pass_over_overwritten_weights_is_an_error(backend):
    weight = nn.Parameter(torch.ones(3))
    loss = (weight**2).sum()
    weight.grad = torch.ones(3)
    AdamW([weight], kernels=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_hung_on_parameters():
    net = model()
    before = [set(vars(p)) for p in net.parameters()]
    train(net, AdamW(net.parameters()), range(2))
    assert [set(vars(p)) for p in net.parameters()] == before


def test_a_failed_step_does_not_count(backend):
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.ones(4), torch.ones(4).to_sparse()
    optimizer = AdamW(weights, kernels=backend)
    with pytest.raises(ValueError, match=r"gradient of the parameter \(group 0, index 1, .*got torch.sparse_coo"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(weights[0], torch.ones(4))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas"])
def test_bounds_are_checked(name, value):
    settings = {name: (0.9, value) if name == "betas" else value}
    with pytest.raises(ValueError, match=f"{name} must be .*got"):
        AdamW([torch.zeros(1)], **settings)
    with pytest.raises(ValueError, match=f"{name} must be .*got"):
        AdamW([{"params": [torch.zeros(1)], **settings}])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_optimizer_steps_on_its_backend(backend, clone):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = AdamW([weight], kernels=backend)
    optimizer.step()
    twin = clone(optimizer)
    twin_weight = twin.param_groups[0]["params"][0]
    twin_weight.grad = torch.ones(3)
    twin.step()
    optimizer.step()
    assert torch.equal(twin_weight, weight)
    assert twin_weight is not weight
