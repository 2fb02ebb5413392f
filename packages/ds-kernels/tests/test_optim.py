"""Fused optimizers: torch's numbers and states, bfloat16 parameters with exact masters, any state in any codec."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from ds_kernels import Adam, AdamW, ReferenceBackend
from ds_kernels.maker import FusedMaker
from ds_kernels.optim import CpuAdam, FusedAdagrad, FusedAdam, FusedLamb, FusedLion, FusedSGD
from torch import nn

SHAPE = (7, 11)

# The class, its settings, and torch's class.
TORCHS = [
    pytest.param(FusedAdam, {"weight_decay": 0.1}, torch.optim.AdamW, id="adamw"),
    pytest.param(FusedAdam, {"weight_decay": 0.1, "adam_w_mode": False}, torch.optim.Adam, id="adam"),
    pytest.param(CpuAdam, {"weight_decay": 0.1}, torch.optim.AdamW, id="cpu-adam"),
    pytest.param(FusedAdagrad, {"lr_decay": 0.1, "weight_decay": 0.1}, torch.optim.Adagrad, id="adagrad"),
    pytest.param(FusedAdagrad, {"initial_accumulator_value": 0.5}, torch.optim.Adagrad, id="adagrad-initial"),
    pytest.param(FusedSGD, {"weight_decay": 0.1}, torch.optim.SGD, id="sgd"),
    pytest.param(FusedSGD, {"momentum": 0.9, "dampening": 0.3}, torch.optim.SGD, id="momentum"),
    pytest.param(FusedSGD, {"momentum": 0.9, "nesterov": True}, torch.optim.SGD, id="nesterov"),
]
with_torch = pytest.mark.parametrize(("kind", "settings", "torch_kind"), TORCHS)
ALL = [FusedAdam, CpuAdam, FusedLamb, FusedLion, FusedAdagrad, FusedSGD]
OWN = {FusedSGD: {"momentum": 0.9}}


def weight(dtype=torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 77).view(SHAPE).to(dtype))


def train(optimizer, steps: int, first: int = 0):
    """Step with gradients that depend on the index of the step only; return the optimizer."""
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                generator = torch.Generator().manual_seed(step)
                param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
        optimizer.step()
    return optimizer


def only(optimizer) -> nn.Parameter:
    [param] = optimizer.param_groups[0]["params"]
    return param


def torchs(settings):
    return {name: value for name, value in settings.items() if name != "adam_w_mode"}


@with_torch
def test_numbers_are_torchs(backend, kind, settings, torch_kind):
    ours = train(kind([weight()], lr=0.01, kernels=backend, **settings), 5)
    theirs = train(torch_kind([weight()], lr=0.01, **torchs(settings)), 5)
    assert torch.allclose(only(ours), only(theirs), rtol=1e-6, atol=1e-7)


@with_torch
def test_states_go_to_torch_and_back(kind, settings, torch_kind):
    ours = train(kind([weight()], lr=0.01, **settings), 3)
    param = nn.Parameter(only(ours).detach().clone())
    theirs = torch_kind([param], lr=0.5)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(theirs, 2, 3)
    train(ours, 2, 3)
    assert torch.allclose(only(ours), param, rtol=1e-6, atol=1e-7)
    back = nn.Parameter(param.detach().clone())
    again = kind([back], lr=0.5, **settings)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert again.param_groups[0]["lr"] == 0.01
    train(again, 2, 5)
    train(theirs, 2, 5)
    assert torch.allclose(back, param, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ALL)
def test_training_in_bfloat16_has_the_bits_of_float32(backend, kind):
    settings = OWN.get(kind, {})
    start = weight(torch.bfloat16)
    low = train(kind([start], lr=1e-3, kernels=backend, **settings), 1)
    full = train(kind([nn.Parameter(weight(torch.bfloat16).detach().float())], lr=1e-3, kernels=backend, **settings), 1)
    for step in range(1, 6):
        train(low, 1, step)
        train(full, 1, step)
        assert torch.equal(low.master(start), only(full))


@pytest.mark.parametrize("moments", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FusedAdam, FusedLamb, FusedLion, FusedSGD])
def test_fewer_bytes_train_nearly_as_well(kind, dtype, moments):
    torch.manual_seed(1)
    x, target = torch.randn(256, 64), torch.randn(64, 8)

    def loss_after(**storage):
        param = nn.Parameter(torch.zeros(64, 8, dtype=dtype))
        optimizer = kind([param], lr=0.02 if kind is not FusedLion else 0.01, **OWN.get(kind, {}), **storage)
        for step in range(150):
            rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
            loss = (x[rows] @ (param.float() - target)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((x @ (optimizer.master(param) - target)).square().mean())

    assert loss_after(moments=moments) < 1.1 * loss_after() + 0.02


def bytes_per_element(optimizer) -> float:
    state = optimizer.state[only(optimizer)]
    return sum(t.nbytes for name, t in state.items() if name != "step") / only(optimizer).numel()


@pytest.mark.parametrize(("moments", "expected"), [("fp32", 10), ("bf16", 6), ("int8", 4.125)])
def test_the_state_has_the_bytes_it_should(moments, expected):
    optimizer = AdamW([nn.Parameter(torch.ones(3200, dtype=torch.bfloat16))], moments=moments)
    assert bytes_per_element(train(optimizer, 1)) == expected


# State dicts between codecs #

MOMENTS = ["fp32", "bf16", "int8"]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_with_the_same_bits(kind, moments, dtype):
    settings = {"lr": 1e-2, "moments": moments, **OWN.get(kind, {})}
    straight = train(kind([weight(dtype)], **settings), 3)
    param = nn.Parameter(only(straight).detach().clone())
    resumed = kind([param], **settings)
    resumed.load_state_dict(pickle.loads(pickle.dumps(straight.state_dict())))
    train(resumed, 3, 3)
    train(straight, 3, 3)
    assert torch.equal(param, only(straight))
    assert torch.equal(resumed.master(param), straight.master(only(straight)))


@pytest.mark.parametrize("to", MOMENTS)
@pytest.mark.parametrize("come_from", MOMENTS)
def test_any_moments_load_into_any(come_from, to):
    source = train(AdamW([weight()], moments=come_from), 3)
    param = nn.Parameter(only(source).detach().clone())
    target = AdamW([param], moments=to)
    target.load_state_dict(source.state_dict())
    assert target.state[param]["step"] == 3
    tolerance = {"fp32": 0, "bf16": 2**-8, "int8": 1 / 32}
    exact = train(AdamW([weight()]), 3)
    for name in ("exp_avg", "exp_avg_sq"):
        state, true = target.state[param], exact.state[only(exact)][name]
        stored = state[name]
        assert stored.shape == param.shape
        fp32 = AdamW([nn.Parameter(param.detach().clone())])
        fp32.load_state_dict(target.state_dict())
        value = fp32.state[only(fp32)][name]
        assert (value - true).abs().max() <= (tolerance[come_from] + tolerance[to]) * true.abs().max()
        assert (f"{name}_scale" in state) == (to == "int8")


def test_a_split_state_completes_float32_parameters_exactly():
    split = train(AdamW([weight(torch.bfloat16)]), 4)
    param = nn.Parameter(only(split).detach().float())
    full = AdamW([param])
    full.load_state_dict(split.state_dict())
    assert torch.equal(param, split.master(only(split)))
    train(full, 2, 4)
    train(split, 2, 4)
    assert torch.equal(param, split.master(only(split)))
    with pytest.raises(ValueError, match=r"load the weights of the same checkpoint first"):
        full.load_state_dict(split.state_dict())


def test_float32_training_goes_on_in_bfloat16_exactly():
    full = train(AdamW([weight()]), 4)
    param = nn.Parameter(only(full).detach().bfloat16())
    split = AdamW([param])
    split.load_state_dict(full.state_dict())
    split.set_master(param, only(full))
    train(full, 2, 4)
    train(split, 2, 4)
    assert torch.equal(split.master(param), only(full))


def test_a_master_can_be_set_before_the_first_step():
    value = torch.linspace(0, 1, 77).view(SHAPE)
    optimizer = FusedSGD([weight(torch.bfloat16)], lr=1e-3, momentum=0.9, dampening=0.5)
    optimizer.set_master(only(optimizer), value)
    assert torch.equal(optimizer.master(only(optimizer)), value)
    full = train(FusedSGD([nn.Parameter(value.clone())], lr=1e-3, momentum=0.9, dampening=0.5), 2)
    train(optimizer, 2)
    assert torch.equal(optimizer.master(only(optimizer)), only(full))


# Settings #


@pytest.mark.parametrize("kind", ALL)
def test_a_copied_optimizer_goes_on(kind):
    optimizer = train(kind([weight()], lr=0.01, moments="int8", kernels=ReferenceBackend(), **OWN.get(kind, {})), 2)
    other = copy.deepcopy(optimizer)
    train(optimizer, 2, 2)
    train(other, 2, 2)
    assert torch.equal(only(optimizer), only(other))


@pytest.mark.parametrize("kind", ALL)
def test_gradients_are_zeroed_in_the_same_pass(backend, kind):
    cleared = train(kind([weight()], lr=0.01, zero_grad=True, kernels=backend, **OWN.get(kind, {})), 2)
    kept = train(kind([weight()], lr=0.01, kernels=backend, **OWN.get(kind, {})), 2)
    assert torch.equal(only(cleared), only(kept))
    assert not only(cleared).grad.count_nonzero()
    assert only(kept).grad.count_nonzero()


def test_cpu_adam_keeps_moments_in_the_parameters_type_if_told():
    optimizer = train(CpuAdam([weight(torch.bfloat16)], fp32_optimizer_states=False), 1)
    assert optimizer.state[only(optimizer)]["exp_avg"].dtype == torch.bfloat16
    optimizer = train(CpuAdam([weight()], fp32_optimizer_states=False), 1)
    assert optimizer.state[only(optimizer)]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("set_grad_none", [True, False])
def test_set_grad_none_says_what_zero_grad_does(set_grad_none):
    optimizer = train(FusedAdam([weight()], set_grad_none=set_grad_none), 1)
    optimizer.zero_grad()
    assert (only(optimizer).grad is None) == set_grad_none


def test_lamb_steps_by_the_ratio_of_the_norms(backend):
    param = weight()
    optimizer = FusedLamb([param], lr=0.1, weight_decay=0.01, max_coeff=2.0, kernels=backend)
    before = param.detach().clone()
    train(optimizer, 1)
    step = before - param.detach()
    direction = param.grad.sign() + 0.01 * before
    ratio = min(float(before.norm() / direction.norm()), 2.0)
    assert torch.allclose(step, 0.1 * ratio * direction, rtol=1e-4, atol=1e-6)
    zeros = nn.Parameter(torch.zeros(3))
    zeros.grad = torch.ones(3)
    FusedLamb([zeros], lr=0.1, kernels=backend).step()
    assert torch.allclose(zeros, torch.full((3,), -0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW([p], moments="int4"), "moments must be one of fp32, bf16, int8; got 'int4'"),
        (lambda p: FusedAdam([p], amsgrad=True), "amsgrad must be false"),
        (lambda p: FusedLion([p], betas=(1.0, 0.9)), r"betas must be two numbers in \[0, 1\)"),
        (lambda p: FusedAdagrad([p], lr_decay=-1.0), "lr_decay must be at least 0; got -1.0"),
        (lambda p: FusedSGD([p], nesterov=True), "nesterov needs a momentum above 0"),
        (lambda p: FusedLamb([p], min_coeff=2.0, max_coeff=1.0), "in this order; got 2.0 and 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(weight())


def test_a_maker_steps_shards_as_the_optimizer_steps_parameters(backend):
    class Shard:
        def __init__(self, numel):
            self.master = nn.Parameter(torch.randn(numel))
            self.grad = torch.randn(numel).bfloat16()
            self.copy = torch.zeros(numel, dtype=torch.bfloat16)

    shards = [Shard(5), Shard(40)]
    peers = [nn.Parameter(shard.master.detach().clone()) for shard in shards]
    maker = FusedMaker(FusedLion, {"lr": 0.1}, kernels=backend)
    optimizer = maker.make([{"params": [shard.master for shard in shards]}])
    peer = FusedLion(peers, lr=0.1, kernels=backend)
    for _ in range(3):
        assert list(maker.update(optimizer, [shards], 0.5)) == [0]
        for shard, param in zip(shards, peers):
            param.grad = shard.grad.float() * 0.5
        peer.step()
        for shard, param in zip(shards, peers):
            assert torch.equal(shard.master, param)
            assert torch.equal(shard.copy, param.bfloat16())


def test_other_types_of_parameters_are_refused(backend):
    with pytest.raises(ValueError, match=r"index 1, shape \(7, 11\)\) must be torch.float32 or .*got torch.float64"):
        Adam([weight(), weight(torch.float64)], kernels=backend)
