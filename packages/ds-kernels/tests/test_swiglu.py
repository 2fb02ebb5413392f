"""bias_swiglu: as accurate as torch's, the same bits on every set and number of threads, every shape, compiled."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import ReferenceBackend
from ds_kernels.ops import bias_swiglu
from ds_kernels.ops.declare import NAMESPACE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

OPS = getattr(torch.ops, NAMESPACE)
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
fixtures_do_not_change = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run(backend, x, bias, grad):
    """Output, gradient of x, gradient of the bias."""
    forward, backward = (backend.find(op, CPU, x.dtype) for op in ("bias_swiglu", "bias_swiglu_backward"))
    return forward(x, bias), *backward(grad, x, bias)


def by_torch(x, bias, grad, dtype=None):
    x, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias))
    gate, value = (x + bias).chunk(2, -1)
    out = functional.silu(gate) * value
    out.backward(grad.to(out.dtype))
    return out.detach(), x.grad, bias.grad


def worst(results, exact):
    return [(result.double() - true).abs().max() for result, true in zip(results, exact, strict=True)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(65, 67), (7, 1031), (900, 33)])
def test_error_is_at_most_twice_torchs(backend, dtype, rows, columns):
    x, grad = (3 * torch.randn(rows, 2 * columns)).to(dtype), torch.randn(rows, columns).to(dtype)
    bias = torch.randn(2 * columns).to(dtype)
    exact = by_torch(x, bias, grad, dtype=torch.float64)
    for ours, theirs in zip(worst(run(backend, x, bias, grad), exact), worst(by_torch(x, bias, grad), exact)):
        assert ours <= 2 * theirs


@given(rows=st.integers(0, 70), columns=st.integers(0, 40), offset=st.integers(0, 3), seed=st.integers(0, 9))
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@fixtures_do_not_change
def test_same_bits_on_every_instruction_set_at_every_alignment(cpu_isas, dtype, with_bias, rows, columns, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * rows * columns + offset, generator=generator).to(dtype)[offset:].view(rows, 2 * columns)
    grad = torch.randn(rows * columns + offset, generator=generator).to(dtype)[offset:].view(rows, columns)
    bias = torch.randn(2 * columns, generator=generator).to(dtype) if with_bias else None
    first, *others = [run(backend, x, bias, grad) for backend in cpu_isas]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    reference = run(ReferenceBackend(), x, bias, grad)
    assert [(t.shape, t.dtype) for t in first] == [(t.shape, t.dtype) for t in reference]


@pytest.mark.parametrize("with_bias", [True, False])
def test_same_bits_on_any_number_of_threads(cpu, threads, with_bias):
    x, grad = torch.randn(519, 262), torch.randn(519, 131)
    bias = torch.randn(262) if with_bias else None
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(cpu, x, bias, grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_large_numbers_and_nan(cpu):
    gate = torch.tensor([torch.inf, torch.nan, 1e38, -1e38, -100.0, 0.0, -0.0, 1e-40])
    x = torch.cat([gate, torch.full_like(gate, 2.0)]).view(1, -1)
    kernel = cpu.find("bias_swiglu", CPU, torch.float32)
    torch.testing.assert_close(kernel(x, None)[0], functional.silu(gate) * 2.0, equal_nan=True)
    finite = x[:, [2, 3, 4, 5, 10, 11, 12, 13]]
    ours = run(cpu, finite, torch.zeros(8), torch.ones(1, 4))
    for a, b in zip(ours, by_torch(finite, torch.zeros(8), torch.ones(1, 4))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias):
    x = torch.randn(3, 10, requires_grad=True)
    torch.library.opcheck(OPS.bias_swiglu.default, (x, torch.randn(10, requires_grad=True) if with_bias else None))


def test_a_compiled_model_is_whole_and_gives_the_same_bits():
    def loss(x, bias):
        return bias_swiglu(x, bias).square().sum()

    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    eager = torch.autograd.grad(loss(x, bias), (x, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, bias), (x, bias)), eager))


def test_tensors_with_gaps_and_more_dimensions_are_copied_by_the_op():
    x, bias, upstream = torch.randn(2, 6, 4).mT.requires_grad_(), torch.randn(12)[::2].requires_grad_(), torch.ones(())
    ours = torch.autograd.grad(bias_swiglu(x, bias).sum(), (x, bias), upstream)
    gate, value = (x + bias).chunk(2, -1)
    theirs = torch.autograd.grad((functional.silu(gate) * value).sum(), (x, bias))
    torch.testing.assert_close(ours, theirs)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"an even number of columns, in its last dimension; got shape \("):
        bias_swiglu(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"at least one dimension; got a single number, shape \(\); pass x\[None\]"):
        bias_swiglu(torch.ones(()))
    with pytest.raises(ValueError, match=r"one torch.float32 value for each of the 4 columns of x; got .* \(2,\)"):
        bias_swiglu(torch.ones(1, 4), torch.ones(2))
