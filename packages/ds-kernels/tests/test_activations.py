"""Native activations: as accurate as torch's, the same bits on every set and number of threads, every shape."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import ReferenceBackend
from ds_kernels.ops import bias_gelu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
APPROXIMATE = ("none", "tanh")
fixtures_do_not_change = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run(backend, x, bias, grad, approximate):
    """Output, gradient of x, gradient of the bias."""
    forward = backend.find("bias_gelu", CPU, x.dtype)
    backward = backend.find("bias_gelu_backward", CPU, x.dtype)
    if forward is None:
        pytest.skip("the backend has no bias_gelu")
    return forward(x, bias, approximate), *backward(grad, x, bias, approximate)


def torch_gelu(x, bias, grad, approximate, dtype=None):
    x, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias))
    out = functional.gelu(x + bias, approximate=approximate)
    out.backward(grad.to(out.dtype))
    return out.detach(), x.grad, bias.grad


def worst(results, exact):
    return [(result.double() - true).abs().max() for result, true in zip(results, exact, strict=True)]


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [7, 65, 2500])
def test_error_is_at_most_twice_torchs(backend, dtype, approximate, rows):
    x, grad = (3 * torch.randn(2, rows, 67)).to(dtype), torch.randn(rows, 67).to(dtype)
    bias = torch.randn(67).to(dtype)
    args = x[0], bias, grad, approximate
    exact = torch_gelu(*args, dtype=torch.float64)
    for ours, theirs in zip(worst(run(backend, *args), exact), worst(torch_gelu(*args), exact)):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_the_negative_tail_keeps_its_relative_accuracy(cpu, approximate):
    x = torch.linspace(-8, -2, 1001)
    exact = functional.gelu(x.double(), approximate=approximate)
    if approximate == "none":
        exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    result = cpu.find("bias_gelu", CPU, torch.float32)(x, None, approximate)
    kept = exact.abs() > 1e-30  # float64's own tanh has cancelled before that
    bound = 1e-6 if approximate == "none" else 1e-5
    assert ((result.double() - exact).abs() <= bound * exact.abs() + 1e-15)[kept].all()


@given(rows=st.integers(0, 70), columns=st.integers(0, 40), offset=st.integers(0, 3), seed=st.integers(0, 9))
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", FLOATS)
@fixtures_do_not_change
def test_same_bits_on_every_instruction_set_at_every_alignment(
    cpu_isas, dtype, approximate, rows, columns, offset, seed
):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(2, rows * columns + offset, generator=generator).to(dtype)
    x, grad = (t[offset:].view(rows, columns) for t in flat)
    bias = torch.randn(columns, generator=generator).to(dtype)
    first, *others = [run(backend, x, bias, grad, approximate) for backend in cpu_isas]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    reference = run(ReferenceBackend(), x, bias, grad, approximate)
    assert [(t.shape, t.dtype) for t in first] == [(t.shape, t.dtype) for t in reference]


@pytest.mark.parametrize("with_bias", [True, False])
def test_same_bits_on_any_number_of_threads(cpu, threads, with_bias):
    x, grad = torch.randn(2, 1037, 131)
    bias = torch.randn(131) if with_bias else None
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(cpu, x, bias, grad, "none"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_infinities_and_nan(cpu, approximate):
    # With erf, torch itself gives NaN for the positive infinity.
    x = torch.tensor([[torch.inf, torch.nan, 1e38, -1e38, 0.0, -0.0, 1e-40]])
    ours = cpu.find("bias_gelu", CPU, torch.float32)(x, torch.zeros(7), approximate)
    torch.testing.assert_close(ours, functional.gelu(x, approximate="tanh"), equal_nan=True)


def test_tensors_with_gaps_are_copied_by_the_op_and_named_by_the_kernel(cpu):
    x, bias = torch.randn(6, 4).t(), torch.randn(12)[::2]
    torch.testing.assert_close(bias_gelu(x, bias), functional.gelu(x + bias))
    with pytest.raises(ValueError, match=r"x must be contiguous .*; got shape \(4, 6\), strides \(1, 4\)"):
        cpu.find("bias_gelu", CPU, torch.float32)(x, None, "none")
