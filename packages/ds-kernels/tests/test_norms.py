"""Norms after an addition: as accurate as torch's, the same bits everywhere, every shape, compiled."""

from __future__ import annotations

import pytest
import torch
from ds_kernels.ops import layer_norm, rms_norm
from ds_kernels.ops.declare import NAMESPACE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

OPS = getattr(torch.ops, NAMESPACE)
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("layer_norm", "rms_norm")
EPS = 1e-5
fixtures_do_not_change = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def inputs(rows, columns, dtype, offset=0):
    """x, residual, weight, bias, gradients of both results; unaligned where offset is odd."""
    flat = torch.randn(4, rows * columns + offset).to(dtype)
    x, residual, grad, grad_sum = (t[offset:].view(rows, columns) for t in flat)
    return 3 * x + 5, residual, torch.randn(columns).to(dtype) + 1, torch.randn(columns).to(dtype), grad, grad_sum


def run(backend, name, x, residual, weight, bias, grad, grad_sum):
    """Normalized rows and sum, then the gradients of x, weight and bias."""
    forward, backward = (backend.find(op, CPU, x.dtype) for op in (name, f"{name}_backward"))
    if forward is None:
        pytest.skip(f"the backend has no {name}")
    extra = (bias,) if name == "layer_norm" else ()
    out, total, *statistics = forward(x, residual, weight, *extra, EPS)
    kept = x if residual is None else total
    return out, total, *backward(grad, None if residual is None else grad_sum, kept, weight, *statistics)


def by_torch(name, x, residual, weight, bias, grad, grad_sum, dtype=None):
    x, residual, weight, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, residual, weight, bias))
    total = x + residual
    total.retain_grad()
    if name == "layer_norm":
        out = functional.layer_norm(total, total.shape[-1:], weight, bias, EPS)
    else:
        out = functional.rms_norm(total, total.shape[-1:], weight, EPS)
    torch.autograd.backward([out, total], [grad.to(out.dtype), grad_sum.to(out.dtype)])
    grads = [x.grad, weight.grad, *([bias.grad] if name == "layer_norm" else [])]
    return [out.detach(), total.detach(), *grads]


def worst(results, exact):
    return [(result.double() - true).abs().max() for result, true in zip(results, exact, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(63, 33), (70, 257), (1500, 96)])
def test_error_is_at_most_twice_torchs(backend, name, dtype, rows, columns):
    args = inputs(rows, columns, dtype)
    exact = by_torch(name, *args, dtype=torch.float64)
    ours, theirs = worst(run(backend, name, *args), exact), worst(by_torch(name, *args), exact)
    assert all(our <= 2 * their for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


@given(rows=st.integers(0, 70), columns=st.integers(1, 200), offset=st.integers(0, 3))
@pytest.mark.parametrize("fused", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@fixtures_do_not_change
def test_same_bits_on_every_instruction_set_at_every_alignment(cpu_isas, name, dtype, fused, rows, columns, offset):
    x, residual, *rest = inputs(rows, columns, dtype, offset)
    args = x, residual if fused else None, *rest
    first, *others = [run(backend, name, *args) for backend in cpu_isas]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_any_number_of_threads(cpu, threads, name):
    args = inputs(517, 131, torch.float32)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(cpu, name, *args))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nan_stays_in_its_row_and_no_rows_give_zero_gradients(backend):
    x, _, weight, bias, grad, grad_sum = inputs(3, 40, torch.float32)
    x[1, 7] = torch.nan
    for name in NAMES:
        out = run(backend, name, x, None, weight, bias, grad, grad_sum)[0]
        assert out.isnan().all(-1).tolist() == [False, True, False]
        empty = run(backend, name, x[:0], None, weight, bias, grad[:0], None)
        assert all(not gradient.any() for gradient in empty[3:])


@pytest.mark.parametrize("fused", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "no-weight"])
def test_opcheck(fused, affine):
    x, residual, weight, bias, *_ = (t.requires_grad_() for t in inputs(3, 5, torch.float32))
    shared = x, residual if fused else None, weight if affine else None
    torch.library.opcheck(OPS.layer_norm.default, (*shared, bias if affine else None, EPS))
    torch.library.opcheck(OPS.rms_norm.default, (*shared, EPS))


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_a_compiled_block_is_whole_and_gives_the_same_bits(function):
    def loss(x, residual, weight):
        normalized, new_residual = function(x, weight, residual=residual)
        return (normalized.sin() + new_residual.square()).sum()

    args = [t.clone().requires_grad_() for t in inputs(4, 6, torch.float32)[:3]]
    eager = torch.autograd.grad(loss(*args), args)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(*args), args), eager))


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_each_result_may_be_used_alone(function):
    x, residual = torch.randn(2, 3, 4).requires_grad_()
    normalized, total = function(x, residual=residual)
    (alone,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    assert torch.equal(alone, torch.ones(3, 4))
    torch.autograd.grad(normalized.square().sum(), residual)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"weight must be one torch.float32 value for each of the 3 columns.*\(2,\)"):
        rms_norm(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"residual must be torch.float32 of shape \(2, 3\), as x; got .* \(3,\)"):
        layer_norm(torch.ones(2, 3), residual=torch.ones(3))
    with pytest.raises(ValueError, match=r"bias is taken with weight only; got no weight"):
        layer_norm(torch.ones(2, 3), bias=torch.ones(3))
