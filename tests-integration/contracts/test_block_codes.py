"""Block codes of ds-comm and of ds-kernels: the same bytes, so that ranks with either understand each other."""

from __future__ import annotations

import ds_comm.codecs
import ds_kernels.codecs
import pytest
import torch
from ds_kernels import CpuBackend, ReferenceBackend

CODES = ("sign", "ternary", "int4", "int8")


def numbers(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.exp(2 * torch.randn(numel, generator=generator))
    x[::7] = 0
    return x


def backends() -> list[pytest.param]:
    cpu = CpuBackend()
    reason = cpu.unusable()
    return [
        pytest.param(ReferenceBackend(), id="reference"),
        pytest.param(cpu, id="cpu", marks=pytest.mark.skipif(reason is not None, reason=str(reason))),
    ]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("numel", "block"), [(0, 64), (1, 64), (4096, 1024), (5001, 192), (2559, 256)])
def test_the_same_bytes_errors_and_values(backend, scale_dtype, dtype, code, numel, block):
    settings = {"code": code, "block": block, "scale_dtype": scale_dtype}
    ours = ds_comm.codecs.BlockCodec(**settings)
    theirs = ds_kernels.codecs.BlockCodec(**settings, kernels=backend)
    fused = ds_comm.codecs.BlockCodec(**settings, kernels=backend)
    x = numbers(numel, 0).to(dtype)
    found = []
    for codec in (ours, theirs, fused):
        error = 0.1 * numbers(numel, 1)
        payload = codec.encode(x, error=error)
        total = codec.accumulate(payload, numbers(numel, 2), scale=0.3)
        found.append((payload, error, codec.decode(payload, torch.empty(numel, dtype=dtype)), total))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30, torch.nan, torch.inf])
@pytest.mark.parametrize("code", CODES)
def test_extremes_are_coded_alike(code, size):
    x = numbers(500, 0)
    x[70:90] *= size
    for scale_dtype in (torch.float32, torch.float16):
        settings = {"code": code, "scale_dtype": scale_dtype}
        ours = ds_comm.codecs.BlockCodec(**settings).encode(x)
        theirs = ds_kernels.codecs.BlockCodec(**settings, kernels=ReferenceBackend()).encode(x)
        if not torch.equal(ours, theirs):
            values = [ds_comm.codecs.BlockCodec(**settings).decode(p, torch.empty(500)) for p in (ours, theirs)]
            assert torch.allclose(*values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("code", CODES)
def test_codecs_that_understand_each_other_say_so(code, scale_dtype):
    settings = {"code": code, "block": 192, "scale_dtype": scale_dtype}
    ours = ds_comm.codecs.BlockCodec(**settings)
    assert ours.meaning == ds_kernels.codecs.BlockCodec(**settings).meaning
    assert ours.meaning == ds_comm.codecs.BlockCodec(**settings, kernels=ReferenceBackend()).meaning
    assert ours.meaning == ds_kernels.codecs.BlockCodec(**settings, kernels=ReferenceBackend()).meaning
