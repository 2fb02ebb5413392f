"""Weights that somebody else writes between steps: the 16 bits below them are stale, and must not spoil the master."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import AdamHyper, AdamW, ReferenceBackend
from ds_kernels.backends.checks import Beside
from ds_kernels.backends.plain import state_codecs
from ds_kernels.optim import CpuAdam, FusedAdagrad, FusedLamb, FusedLion, FusedSGD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

EDGES = torch.tensor([-(2**15), -(2**15) + 1, -2, -1, 0, 1, 2, 2**15 - 2, 2**15 - 1], dtype=torch.int16)


def all_weights() -> Tensor:
    """Every bfloat16 pattern."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def stands_still(backend, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Decode and encode by a step of size 0."""
    high, low = high.clone(), low.clone()
    adamw = backend.find("coded_adamw", high.device, high.dtype)
    zeros = torch.zeros(3, *high.shape)
    adamw(high, *zeros, hyper=AdamHyper(step=1, lr=0.0), beside=Beside(low))
    return high, low


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@given(low=st.sampled_from(EDGES.tolist()) | st.integers(-(2**15), 2**15 - 1))
@settings(max_examples=60, deadline=None)
def test_no_remainder_turns_a_weight_into_another(low):
    high = all_weights()
    master = state_codecs.join(high, torch.full(high.shape, low, dtype=torch.int16))
    assert torch.equal(master.isnan(), high.isnan())
    assert master[high.isfinite()].isfinite().all()
    again, _ = state_codecs.split(master)
    number = ~high.isnan()
    assert same_bits(again[number], high[number])


def test_every_backend_reads_them_alike(backend):
    if backend.find("coded_adamw", torch.device("cpu"), torch.bfloat16) is None:
        pytest.skip(f"the backend {backend.name} has AdamW in float32 only")
    high = all_weights()
    ends = high.isinf() | (high == 0)
    pairs = [(high, EDGES[torch.randint(len(EDGES), high.shape)])]
    pairs += [(high[ends], edge.expand(int(ends.sum())).contiguous()) for edge in EDGES]
    for high, low in pairs:
        want = state_codecs.split(state_codecs.join(high, low))
        assert all(map(same_bits, stands_still(backend, high, low), want))


@pytest.mark.parametrize("kind", [AdamW, CpuAdam, FusedAdagrad, FusedLamb, FusedLion, FusedSGD])
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("start", [1.0, -1.0])
def test_training_goes_on_from_weights_set_to_zero(request, kind, name, start):
    kernels = ReferenceBackend() if name == "reference" else request.getfixturevalue("cpu")
    weight = nn.Parameter(torch.full((64,), start, dtype=torch.bfloat16))
    optimizer = kind([weight], lr=1.001e-3, kernels=kernels)
    for _ in range(3):
        for sign in (1, -1):  # remainders of both signs
            weight.grad = torch.full_like(weight, sign)
            optimizer.step()
            weight.data.zero_()
            assert optimizer.master(weight).abs().max() < 5e-41
    weight.data.clamp_(0.5)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.isfinite().all()
    assert optimizer.master(weight).isfinite().all()
