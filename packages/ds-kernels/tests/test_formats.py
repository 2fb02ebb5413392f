"""Reading and writing bfloat16 and float16 gives the bits that torch gives, for every kind of number."""

from __future__ import annotations

import pytest
import torch

HALVES = [torch.bfloat16, torch.float16]
CANONICAL_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_exactly(cpu_isas, dtype):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for backend in cpu_isas:
        read = torch.empty(2**16)
        backend.tree_sum(read, [halves])
        assert torch.equal(read.isnan(), halves.isnan())
        numbers = ~halves.isnan()
        assert torch.equal(read[numbers].view(torch.int32), halves.float()[numbers].view(torch.int32))


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_are_rounded_to_nearest_even(cpu_isas, dtype):
    # Every sign, exponent and leading mantissa, with ties, their neighbours, and mantissas that carry.
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    floats = (high[:, None] + low.to(torch.int32)).view(-1).view(torch.float32)
    expected = floats.to(dtype).view(torch.int16)
    expected[floats.isnan()] = CANONICAL_NAN[dtype]
    for backend in cpu_isas:
        written = torch.empty(len(floats), dtype=dtype)
        backend.tree_sum(written, [floats])
        assert torch.equal(written.view(torch.int16), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_adam_writes_the_copy_as_torch_rounds_it(cpu_isas, adam_state, hyper, dtype):
    state = adam_state(5003, copy_dtype=dtype)
    state.param[:100] *= 1e-6  # subnormal in float16
    state.param[100:200] *= 1e6  # infinite in float16
    for backend in cpu_isas:
        stepped = state.stepped(backend, hyper)
        assert torch.equal(stepped.copy, stepped.param.to(dtype))
