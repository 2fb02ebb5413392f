"""Infinities, NaNs, subnormals and empty tensors go through as arithmetic says."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import AdamHyper

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_spoils_its_element_only(backend, adam_state, hyper, bad, dtype):
    state = adam_state(100, dtype, torch.bfloat16)
    clean = state.stepped(backend, hyper)
    state.grad[37] = bad
    spoilt = state.stepped(backend, hyper)
    assert spoilt.param[37].isnan()
    assert spoilt.copy[37].isnan()
    assert not spoilt.exp_avg[37].isfinite()
    others = torch.arange(100) != 37
    assert spoilt.map(lambda t: t[others]).same_bits(clean.map(lambda t: t[others]))


def test_an_infinite_parameter_stays_infinite_without_decay(backend, adam_state):
    for decoupled in (True, False):
        state = adam_state(20)
        state.param[3] = torch.inf
        state.run(backend, AdamHyper(step=1, lr=0.1, decoupled=decoupled))
        assert state.param[3] == torch.inf
        assert state.exp_avg.isfinite().all()


def test_sums_pass_on_infinity_and_nan(backend):
    x = torch.ones(128)
    x[5] = torch.inf
    x[70] = torch.nan
    out = torch.empty(128)
    backend.tree_sum(out, [x, x, torch.ones(128)])
    assert out[5] == torch.inf
    assert out[70].isnan()
    assert out.isfinite().sum() == 126
    sums = backend.chunk_sumsq(x, 64)
    assert sums[0] == torch.inf
    assert sums[1].isnan()


def test_subnormal_moments_are_kept(backend):
    zeros = torch.zeros(33)
    moments = zeros.clone(), torch.full((33,), 1e-40)
    hyper = AdamHyper(step=5, lr=0.1, beta2=0.5)
    backend.adamw(torch.ones(33), zeros, *moments, copy=None, hyper=hyper)
    assert torch.equal(moments[1], torch.full((33,), 1e-40) * 0.5)
    assert moments[1].count_nonzero() == 33


def test_nothing_to_do(backend, hyper):
    empty = torch.empty(0)
    backend.adamw(empty, empty, empty, empty, copy=empty.bfloat16(), hyper=hyper)
    backend.tree_sum(empty, [empty, empty])
    assert backend.chunk_sumsq(empty, 64).shape == (0,)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 4)], ids=str)
def test_any_shape_is_stepped_elementwise(backend, hyper, shape):
    tensors = [torch.rand(shape) for _ in range(4)]
    flat = [t.clone().flatten() for t in tensors]
    backend.adamw(*tensors, copy=None, hyper=hyper)
    backend.adamw(*flat, copy=None, hyper=hyper)
    assert all(torch.equal(t.flatten(), f) for t, f in zip(tensors, flat))
