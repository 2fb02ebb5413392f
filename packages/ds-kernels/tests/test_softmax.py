"""Softmax of masked scores with dropout: torch's accuracy, every mask and length, rows that see nothing."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import ReferenceBackend
from ds_kernels.backends.plain.philox import element_numbers
from ds_kernels.ops import masked_softmax_dropout
from ds_kernels.ops.declare import NAMESPACE
from torch.nn import functional

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS = getattr(torch.ops, NAMESPACE)
MASKS = {  # of scores [2, 3, 5, keys]
    "none": None,
    "keys": (1, 1, 1, -1),
    "batch": (2, 1, 1, -1),
    "queries": (5, -1),
    "heads": (3, 1, 1),
    "all": (2, 3, 5, -1),
}


def run(backend, scores, mask, grad, *terms):
    """Dropped and kept probabilities, gradient of the scores."""
    forward = backend.find("masked_softmax_dropout", CPU, scores.dtype)
    backward = backend.find("masked_softmax_dropout_backward", CPU, scores.dtype)
    out, kept = forward(scores, mask, *terms)
    kept = out if terms[-1] is None else kept
    return out, kept, backward(grad, kept, *terms)


def composed(scores, mask, grad, scale, causal, p, seed, dtype):
    """The same as torch operations of one data type."""
    leaf = scores.to(dtype, copy=True).requires_grad_()
    seen = leaf * scale if mask is None else leaf * scale + mask.to(dtype)
    if causal:
        seen = seen.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    kept = out = functional.softmax(seen, -1)
    if seed is not None:
        out = kept * (element_numbers(seed, scores.numel()).view(scores.shape) >= round(p * 2**16)) / (1 - p)
    out.backward(grad.to(dtype))
    return out.detach(), kept.detach(), leaf.grad


def no_worse(ours, plain, exact):
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        wrong, allowed = ((value.double() - true).norm() for value in (mine, theirs))
        assert wrong <= 2 * allowed + torch.finfo(mine.dtype).eps / 4 * true.norm()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_more_than_twice_the_error_of_torch(backend, dtype, mask, causal):
    for keys, p in ((7, 0.0), (131, 0.25)):
        scores, grad = (3 * torch.randn(2, 2, 3, 5, keys)).to(dtype)
        shape = MASKS[mask] and tuple(keys if size == -1 else size for size in MASKS[mask])
        added = None if shape is None else torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -8).to(dtype)
        terms = 0.5, causal, p, torch.tensor(9) if p else None
        plain = composed(scores, added, grad, *terms, dtype)
        no_worse(run(backend, scores, added, grad, *terms), plain, composed(scores, added, grad, *terms, torch.float64))


@pytest.mark.parametrize("keys", [1, 2, 64, 100, 1023, 1028, 5000])
def test_any_number_of_keys(backend, keys):
    scores, grad = torch.randn(2, 2, keys)
    terms = 1.0, False, 0.5, torch.tensor(1)
    exact = composed(scores, None, grad, *terms, torch.float64)
    no_worse(run(backend, scores, None, grad, *terms), composed(scores, None, grad, *terms, torch.float32), exact)


def test_a_row_that_sees_nothing_is_zeros(backend):
    scores, grad = torch.randn(2, 3, 70)
    mask = torch.zeros(3, 70)
    mask[1] = -torch.inf
    for terms in ((1.0, False, 0.0, None), (1.0, True, 0.3, torch.tensor(2))):
        out, kept, grad_scores = run(backend, scores, mask, grad, *terms)
        assert not any(t[1].any() for t in (out, kept, grad_scores))
        assert all(t.isfinite().all() for t in (out, kept, grad_scores))
        torch.testing.assert_close(kept.sum(-1), torch.tensor([1.0, 0.0, 1.0]))


def test_nan_and_infinity_come_through(backend):
    scores = torch.zeros(3, 70)
    scores[0, 3], scores[1, 5] = torch.nan, torch.inf
    scores[2] = -torch.inf
    scores[2, 69] = torch.nan
    out = run(backend, scores, None, scores, 1.0, False, 0.0, None)[0]
    assert out[0].isnan().all()
    assert out[1, 5].isnan()
    assert out[2, 69].isnan()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 5), (2, 0, 3, 4)], ids=str)
def test_nothing_in_nothing_out(backend, shape):
    scores = torch.randn(shape)
    assert all(t.shape == shape for t in run(backend, scores, None, scores, 1.0, True, 0.5, torch.tensor(1)))


def test_the_mask_of_plain_torch(backend):
    for shape in ((3, 67), (5, 8), (2, 3, 130)):
        scores, terms = torch.zeros(shape), (1.0, False, 0.5, torch.tensor(-3))
        mine, plain = (run(b, scores, None, scores, *terms)[0] for b in (backend, ReferenceBackend()))
        assert torch.equal(mine == 0, plain == 0)


def test_same_bits_on_any_number_of_threads_and_instruction_set(cpu_isas, threads):
    scores, grad = torch.randn(2, 4, 100, 131)
    results = []
    for number, backend in ((1, cpu_isas[0]), (2, cpu_isas[0]), *((3, isa) for isa in cpu_isas)):
        threads(number)
        results.append(run(backend, scores, scores[:1, :1], grad, 0.5, True, 0.1, torch.tensor(1)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_masks_of_bool_and_with_gaps():
    scores = torch.randn(2, 3, 5, 8)
    seen = torch.rand(2, 1, 5, 8) < 0.7
    seen[0, 0, 0] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    expected = functional.softmax(scores + added, -1).nan_to_num(0.0)
    for mask in (seen, added, added.transpose(2, 3).contiguous().transpose(2, 3), added[:, :, :, :]):
        torch.testing.assert_close(masked_softmax_dropout(scores, mask), expected)
    torch.testing.assert_close(
        masked_softmax_dropout(scores.transpose(0, 1), seen.transpose(0, 1)), expected.transpose(0, 1)
    )


@pytest.mark.parametrize("shape", [None, (5, 4), (2, 1, 1, 4), (3, 5, 1)], ids=str)
def test_gradients_in_float64(shape):
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)]
    if shape is not None:
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    for terms in ({}, {"p": 0.4, "seed": torch.tensor(3), "scale": 0.3, "causal": True}):
        assert torch.autograd.gradcheck(lambda *t, terms=terms: masked_softmax_dropout(*t, **terms), inputs)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(p):
    scores = torch.randn(2, 3, 5, 4, requires_grad=True)
    for mask in (None, torch.randn(3, 1, 4), torch.randn(5, 1, requires_grad=True)):
        args = scores, mask, 0.5, True, p, torch.tensor(3) if p else None
        torch.library.opcheck(OPS.masked_softmax_dropout.default, args)


def test_no_mask_is_kept():
    scores = torch.randn(2, 6, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        masked_softmax_dropout(scores, p=0.5)
    assert sorted(kept) == [8, scores.nbytes]


def test_with_p_of_1_no_weight_is_left():
    scores = torch.randn(2, 6, 8, requires_grad=True)
    weights = masked_softmax_dropout(scores, p=1.0)
    assert not weights.any()
    assert not torch.autograd.grad(weights.square().sum() + weights.sum(), scores)[0].any()
    assert masked_softmax_dropout(scores, p=1.0, training=False).any()


def test_compiled_it_draws_the_seeds_of_eager_torch():
    scores = torch.randn(2, 6, 8, requires_grad=True)
    seen = torch.rand(6, 8) < 0.8

    def loss(scores):
        return masked_softmax_dropout(scores, seen, p=0.5).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(function(scores), scores)[0])
    assert torch.equal(*results)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"scores must be .*; got shape \(3,\)"):
        masked_softmax_dropout(torch.zeros(3))
    for mask in (torch.zeros(2, 4), torch.zeros(3, 4).double(), torch.zeros(1, 1, 3, 4), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"mask must be bool or torch.float32, .* broadcasts to \(3, 4\); got"):
            masked_softmax_dropout(torch.zeros(3, 4), mask)
    with pytest.raises(ValueError, match="p must be at least 0 and at most 1; got -1"):
        masked_softmax_dropout(torch.zeros(3, 4), p=-1)
