"""The norms' GPU sources, run on the CPU: as exact as torch operations in the same precision, both against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ds_kernels import ReferenceBackend

PLAIN = ReferenceBackend()
# Shorter and longer than a thread's registers hold, for both sizes of a block; whole packets and not.
SHAPES = [(3, 4), (2, 5, 131), (9, 1023), (2, 1028), (3, 4100), (0, 8)]


def widened(tensor):
    return None if tensor is None else tensor.double()


def exact_norm(x, residual, weight, bias, eps, *, layer):
    """Normalized rows in float64 of the sum as it is stored, and the numbers that the backward pass needs."""
    total = x if residual is None else x + residual
    wide = total.double()
    mean = wide.mean(-1, keepdim=True) if layer else torch.zeros(*wide.shape[:-1], 1, dtype=torch.float64)
    scale = ((wide - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    out = (wide - mean) * scale
    out = out if weight is None else out * weight.double()
    return total, out if bias is None else out + bias.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [True, False], ids=["layer_norm", "rms_norm"])
def test_norms_are_as_exact_as_torch(on_host, shape, layer):
    op = "layer_norm" if layer else "rms_norm"
    if PLAIN.find(op, torch.device("cpu"), torch.float32) is None:
        pytest.skip(f"there is no plain {op} to compare with")
    for dtype, affine, added in product((torch.float32, torch.bfloat16, torch.float16), (True, False), (True, False)):
        x, residual, grad, grad_sum = torch.randn(4, *shape).to(dtype)
        x = x + 2  # a mean that is not small
        residual, grad_sum = (residual, grad_sum) if added else (None, None)
        weight = torch.randn(shape[-1]).to(dtype) if affine else None
        bias = torch.randn(shape[-1]).to(dtype) if affine and layer else None
        forward = (x, residual, weight, *([bias] if layer else []), 1e-5)
        got, torchs = (backend.find(op, x.device, dtype)(*forward) for backend in (on_host, PLAIN))
        total, want = exact_norm(x, residual, weight, bias, 1e-5, layer=layer)
        _check(got[0], torchs[0], want)
        assert torch.equal(got[1], x.new_empty(0) if residual is None else total)

        leaves = [t.requires_grad_() for t in (total.double(), widened(weight), widened(bias)) if t is not None]
        exact = exact_norm(leaves[0], None, *[*leaves[1:], None, None][:2], 1e-5, layer=layer)[1]
        right = list(torch.autograd.grad(exact, leaves, grad.double()))
        if added:
            right[0] = right[0] + grad_sum.double()
        backward = (grad, grad_sum, total, weight, *got[2:])
        results = [backend.find(f"{op}_backward", x.device, dtype)(*backward) for backend in (on_host, PLAIN)]
        for ours, theirs, exact_grad in zip(*results, right):
            _check(ours, theirs, exact_grad)


def _check(ours, theirs, exact):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.numel():
        errors = [float((t.double() - exact).abs().max()) for t in (ours, theirs)]
        # among few values torch may happen to be exact: there, a unit in the last place is no error
        room = torch.finfo(ours.dtype).eps * float(exact.abs().max()) / (1 if ours.numel() < 2000 else 4)
        assert errors[0] <= 2 * errors[1] + room, errors
