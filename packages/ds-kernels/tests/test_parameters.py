"""Parameters in any order of memory, and those that cannot be stepped."""

from __future__ import annotations

import copy

import pytest
import torch
from ds_kernels import AdamW
from ds_kernels.optim import FusedAdagrad, FusedAdam, FusedLamb, FusedLion, FusedSGD
from torch import Tensor, nn

KINDS = [FusedAdam, FusedLamb, FusedLion, FusedAdagrad, FusedSGD]
OWN = {FusedSGD: {"momentum": 0.9}}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 3).contiguous().transpose(0, 3)


def gradients(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 3, 5, 4, 7, generator=torch.Generator().manual_seed(0)).to(dtype)


def trained(kind, param: Tensor, order_of_grads, dtype=torch.float32, **settings):
    weight = nn.Parameter(param.clone().to(dtype))
    optimizer = kind([weight], lr=0.01, **OWN.get(kind, {}), **settings)
    for gradient in gradients(dtype):
        weight.grad = order_of_grads(gradient)
        optimizer.step()
    return optimizer, weight


@pytest.mark.parametrize("order", [channels_last, transposed])
@pytest.mark.parametrize("order_of_grads", [channels_last, torch.clone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FusedAdam, FusedLion, FusedAdagrad, FusedSGD])
def test_any_order_of_memory_gives_the_bits_of_the_usual_one(backend, kind, dtype, order, order_of_grads):
    start = torch.randn(3, 5, 4, 7)
    plain, weight = trained(kind, start, torch.clone, dtype, kernels=backend) if _knows(backend) else _skip()
    ordered, other = trained(kind, order(start), order_of_grads, dtype, kernels=backend)
    assert other.stride() == order(start).stride()
    assert torch.equal(weight, other)
    assert torch.equal(plain.master(weight), ordered.master(other))
    for name in plain.moments:
        if name in plain.state[weight]:
            assert torch.equal(plain.state[weight][name], ordered.state[other][name])


def _knows(backend) -> bool:
    return backend.find("coded_sgd", torch.device("cpu"), torch.bfloat16) is not None


def _skip():
    pytest.skip("this backend has AdamW in float32 only")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [channels_last, transposed])
def test_codes_of_8_bits_follow_the_order_of_memory(kind, order):
    optimizer, weight = trained(kind, order(torch.randn(3, 5, 4, 7)), torch.clone, moments="int8")
    for given in (order, torch.clone):  # the same order, and another
        again = nn.Parameter(given(weight.detach()))
        resumed = kind([again], moments="int8", **OWN.get(kind, {}))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name, want in optimizer.torch_state_dict()["state"][0].items():
            got = resumed.torch_state_dict()["state"][0][name]
            assert (got - want).abs().max() <= (0 if given is order else 0.05) * want.abs().max()


def test_gradients_in_another_order_are_zeroed_as_well():
    weight = nn.Parameter(channels_last(torch.ones(2, 3, 4, 5)))
    weight.grad = torch.ones(2, 3, 4, 5)
    optimizer = FusedAdam([weight], lr=0.25, zero_grad=True)
    optimizer.step()
    assert not weight.grad.count_nonzero()
    assert torch.allclose(weight, torch.tensor(0.75))


def test_a_convolution_trains_as_in_torch():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    ours, theirs = (
        FusedAdam(net.parameters(), lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1),
    )
    x = channels_last(torch.randn(2, 3, 8, 8))
    for _ in range(3):
        for model, optimizer in ((net, ours), (other, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.ones(2, 3).double(), r"must be torch.float32 or torch.bfloat16; got torch.float64; convert it"),
        (torch.ones(2, 6)[:, ::2], r"one array without gaps or overlaps; got strides \(6, 2\); make it of"),
        (torch.ones(1, 3).expand(2, 3), r"got strides \(0, 1\)"),
        (torch.ones(2, 3).to_sparse(), r"must be a dense tensor; got torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_stepped_is_found_when_it_is_added(kind, wrong, text):
    named = [("bias", nn.Parameter(torch.ones(3))), ("weight", nn.Parameter(wrong))]
    with pytest.raises(ValueError, match=r"^the parameter 'weight' \(group 0, index 1, shape \(2, 3\)\) .*" + text):
        kind(named)
    optimizer = kind([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"^the parameter \(group 1, index 0, shape \(2, 3\)\) .*" + text):
        optimizer.add_param_group({"params": [nn.Parameter(wrong)]})
    assert len(optimizer.param_groups) == 1


def test_frozen_parameters_may_be_anything():
    frozen = nn.Parameter(torch.ones(2).half(), requires_grad=False)
    AdamW([nn.Parameter(torch.ones(2)), frozen]).step()


def test_nothing_moves_where_one_gradient_cannot_be_read():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW(weights)
    weights[0].grad = torch.ones(3)
    weights[1].grad = torch.ones(3).to_sparse()
    with pytest.raises(
        ValueError, match=r"^the gradient of the parameter \(group 0, index 1.*turn sparse gradients off"
    ):
        optimizer.step()
    weights[1].data = weights[1].data.half()
    weights[1].grad = torch.ones(3).half()
    with pytest.raises(ValueError, match=r"^the parameter \(group 0, index 1.* got torch.float16"):
        optimizer.step()
    assert torch.equal(weights[0], torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"fused": True}, "takes no argument 'fused'; got True; every step is one fused kernel"),
        ({"foreach": False}, "takes no argument 'foreach'; got False; every step is one fused kernel"),
        ({"maximize": True}, "takes no argument 'maximize'; got True; it is not offered; use torch.optim's class"),
        ({"learning_rate": 1}, "takes no argument 'learning_rate'; got 1; the signature of"),
        ({"kernels": "reference"}, r"kernels must be a backend such as ReferenceBackend\(\); got the text 'reference'"),
        ({"rounding": "stochastic"}, r"rounding must be an object such as StochasticRounding\(seed=0\); got the text"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_are_not_offered_say_so(kind, settings, text):
    with pytest.raises(TypeError, match=text):
        kind([nn.Parameter(torch.ones(2))], **settings)


def test_float16_is_refused_before_anything_moves():
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).half())]
    optimizer = AdamW(weights)  # a partitioner would put float32 masters in their place
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"^the parameter \(group 0, index 1, .* got torch.float16; convert it"):
        optimizer.step()
    assert torch.equal(weights[0], torch.ones(3))


def test_parameters_whose_memory_comes_later_may_be_added():
    AdamW([nn.Parameter(torch.ones(()).expand(2, 3))])
