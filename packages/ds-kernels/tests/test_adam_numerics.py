"""Adam steps are as accurate as torch's own, and agree with them to two units in the last place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ds_kernels import AdamHyper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LENGTH = 4099  # whole vectors of every instruction set, and a tail


def torch_step(state, hyper, **kwargs):
    """The same step by ``torch.optim``; scaling and casting of the gradient beforehand."""
    kind = torch.optim.AdamW if hyper.decoupled else torch.optim.Adam
    param = torch.nn.Parameter(state.param.clone())
    param.grad = state.grad.float() * hyper.scale
    betas = (hyper.beta1, hyper.beta2)
    optimizer = kind([param], hyper.lr, betas, hyper.eps, hyper.weight_decay, **kwargs)
    optimizer.state[param] = {
        "step": torch.tensor(hyper.step - 1.0),
        "exp_avg": state.exp_avg.clone(),
        "exp_avg_sq": state.exp_avg_sq.clone(),
    }
    optimizer.step()
    return [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]


def exact_step(state, hyper):
    """The same step in float64, from the textbook."""
    p, g, m, v = (t.double() for t in (state.param, state.grad, state.exp_avg, state.exp_avg_sq))
    g = g * hyper.scale
    if hyper.decoupled:
        p = p - hyper.lr * hyper.weight_decay * p
    else:
        g = g + hyper.weight_decay * p
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    return [p - exact_update(hyper, m, v), m, v]


def exact_update(hyper, m, v):
    """What the step subtracts from the parameters, in float64."""
    m_hat = m.double() / (1 - hyper.beta1**hyper.step)
    v_hat = v.double() / (1 - hyper.beta2**hyper.step)
    return hyper.lr * m_hat / (v_hat.sqrt() + hyper.eps)


def spacing(x):
    """Distance from ``x`` to the next float32 away from zero."""
    return torch.nextafter(x.abs(), torch.tensor(torch.inf)) - x.abs()


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_torchs(backend, adam_state, grad_dtype, copy_dtype, decoupled):
    state = adam_state(LENGTH, grad_dtype, copy_dtype)
    hyper = AdamHyper(step=3, lr=1e-2, weight_decay=0.1, decoupled=decoupled, scale=0.25)
    exact = exact_step(state, hyper)
    theirs = torch_step(state, hyper)
    ours = state.stepped(backend, hyper)
    for name, x, our, their in zip(("param", "exp_avg", "exp_avg_sq"), exact, ours.results(), theirs):
        our_error = (our.double() - x).abs().max()
        their_error = (their.double() - x).abs().max()
        assert our_error <= 2 * their_error, name
    if copy_dtype is not None:
        assert torch.equal(ours.copy, ours.param.to(copy_dtype))


@pytest.mark.parametrize("kwargs", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.3, 0.5), (0.5, 0.0)], ids=str)
def test_within_two_units_of_torch(backend, adam_state, betas, decoupled, kwargs):
    state = adam_state(LENGTH)
    hyper = AdamHyper(step=8, lr=1e-3, beta1=betas[0], beta2=betas[1], weight_decay=0.01, decoupled=decoupled)
    ours = state.stepped(backend, hyper).results()
    for before, our, their in zip(state.results(), ours, torch_step(state, hyper, **kwargs)):
        # The subtraction may cancel, so a unit is that of the larger of the old and the new value.
        unit = torch.maximum(spacing(before), spacing(their))
        assert ((our - their).abs() <= 2 * unit).all()


@given(
    step=st.integers(1, 10**6),
    lr=st.floats(0, 1),
    beta1=st.floats(0, 0.999),
    beta2=st.floats(0, 0.99999),
    weight_decay=st.floats(0, 0.5),
    scale=st.floats(1e-4, 1e4),
    decoupled=st.booleans(),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_hyperparameters_stay_within_the_roundings(cpu, adam_state, **numbers):
    hyper = AdamHyper(**numbers)
    state = adam_state(67)
    param, *moments = state.stepped(cpu, hyper).results()
    # torch's vector loop has the same bits, its loop over the last elements fuses no multiplication with an addition
    for before, our, their in zip(state.results()[1:], moments, torch_step(state, hyper, fused=True)[1:]):
        assert ((our - their).abs() <= 2 * torch.maximum(spacing(before), spacing(their))).all()
    # The update passes six roundings (step size, product, root, eps, sum, quotient), a decayed parameter two (factor,
    # product), the result one; each is at most half a unit. The spare one covers products of these errors.
    decay = 1.0 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0
    update = exact_update(hyper, *moments)
    exact = state.param.double() * decay - update
    bound = 2.0**-24 * (7 * update.abs() + (2 if hyper.decoupled else 0) * state.param.abs() + 1.01 * exact.abs())
    assert ((param.double() - exact).abs() <= bound).all()


def test_scale_multiplies_the_gradient(backend, adam_state, hyper):
    state = adam_state(LENGTH)
    halved = dataclasses.replace(hyper, scale=0.5)
    scaled = state.with_grad(state.grad * 0.5).stepped(backend, hyper)
    assert state.stepped(backend, halved).same_bits(scaled)


def test_gradient_is_left_as_it_was(backend, adam_state):
    state = adam_state(LENGTH)
    hyper = AdamHyper(step=1, lr=0.1, weight_decay=0.1, decoupled=False, scale=3.0)
    grad = state.grad.clone()
    state.run(backend, hyper)
    assert torch.equal(state.grad, grad)


def test_zero_gradient_keeps_zero_moments(backend):
    zeros = torch.zeros(100)
    param = torch.ones(100)
    hyper = AdamHyper(step=1, lr=0.1, weight_decay=0.5)
    moments = zeros.clone(), zeros.clone()
    backend.adamw(param, zeros, *moments, copy=None, hyper=hyper)
    assert torch.equal(moments[0], zeros)
    assert torch.equal(moments[1], zeros)
    assert torch.equal(param, torch.full((100,), 0.95))
