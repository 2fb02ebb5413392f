"""Under torch.autocast ops take float32 parameters and lower inputs, as torch's own do."""

from __future__ import annotations

import pytest
import torch
from ds_kernels.layers import TransformerConfig, TransformerLayer
from ds_kernels.ops import (
    bias_dropout_residual,
    bias_gelu,
    bias_swiglu,
    layer_norm,
    linear_cross_entropy,
    linear_gelu,
    masked_softmax_dropout,
    rms_norm,
)
from torch.nn import functional

DTYPES = (torch.bfloat16, torch.float16)


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def linear_and(op):
    return lambda x, w, b: op(functional.linear(x, w), b)


def torchs_swiglu(x, w, b):
    gate, value = functional.linear(x, w, b).chunk(2, -1)
    return functional.silu(gate) * value


def target(hidden):
    return torch.arange(len(hidden)) % 6


PAIRS = {
    "bias_gelu": (linear_and(bias_gelu), lambda x, w, b: functional.gelu(functional.linear(x, w, b))),
    "bias_swiglu": (linear_and(bias_swiglu), torchs_swiglu),
    "linear_gelu": (linear_gelu, lambda x, w, b: functional.gelu(functional.linear(x, w, b))),
    "linear_cross_entropy": (
        lambda x, w, b: linear_cross_entropy(x, w, target(x), b),
        lambda x, w, b: functional.cross_entropy(functional.linear(x, w, b), target(x)),
    ),
    "softmax": (
        lambda x, w, b: masked_softmax_dropout(functional.linear(x, w), b[None]),
        lambda x, w, b: torch.softmax(functional.linear(x, w) + b, -1),
    ),
    "dropout": (
        lambda x, w, b: bias_dropout_residual(functional.linear(x, w), b, x, 0.0),
        lambda x, w, b: functional.linear(x, w, b) + x,
    ),
    "layer_norm": (
        lambda x, w, b: layer_norm(functional.linear(x, w), b, b, residual=x)[0],
        lambda x, w, b: functional.layer_norm(functional.linear(x, w) + x, (6,), b, b),
    ),
    "rms_norm": (
        lambda x, w, b: rms_norm(functional.linear(x, w), b, residual=x)[0],
        lambda x, w, b: functional.rms_norm(functional.linear(x, w) + x, (6,), b, 1e-6),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_results_and_gradients_are_torchs(name, dtype):
    tensors = leaves((8, 6), (6, 6), (6,))
    results = []
    for call in PAIRS[name]:
        with torch.autocast("cpu", dtype):
            out = call(*tensors)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.float() - theirs.float()).abs().max() <= 16 * torch.finfo(dtype).eps * theirs.float().abs().max()
    # Types are those of torch; but what torch promotes to float32 by a float32 parameter stays in the input's type.
    assert results[0][0].dtype in (results[1][0].dtype, dtype)
    assert [g.dtype for g in results[0][1:]] == [torch.float32] * 3


def test_products_are_in_the_type_of_autocast():
    x, weight, bias = leaves((8, 6), (6, 6), (6,))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(x, weight, bias).dtype == torch.bfloat16
        assert linear_cross_entropy(x, weight, target(x), bias).dtype == torch.float32
        assert layer_norm(x, bias, bias)[0].dtype == torch.float32
        lower = torch.equal(linear_gelu(x, weight, bias), linear_gelu(*(t.bfloat16() for t in (x, weight, bias))))
    assert lower


def test_without_autocast_nothing_is_cast():
    with pytest.raises(ValueError, match=r"bias must be one torch.bfloat16 value"):
        bias_gelu(torch.ones(2, 3).bfloat16(), torch.ones(3))
    with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match=r"residual must be torch.bfloat16"):
        layer_norm(torch.ones(2, 3).bfloat16(), residual=torch.ones(2, 3))


def test_float64_is_not_cast():
    x, weight, bias = (t.double() for t in leaves((8, 6), (6, 6), (6,)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(x, weight, bias).dtype == torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("settings", [{}, {"pre_layer_norm": False}, {"activation": "swiglu", "norm": "rms_norm"}])
def test_a_layer_trains_under_autocast(settings, dropout):
    config = TransformerConfig(
        hidden_size=16,
        heads=2,
        attn_dropout_ratio=dropout,
        hidden_dropout_ratio=dropout,
        gelu_checkpoint=True,
        **settings,
    )
    layer, x = TransformerLayer(config), torch.randn(2, 5, 16)
    mask = torch.zeros(2, 1, 1, 5)

    def outcome():
        torch.manual_seed(1)
        out = layer(x, mask)
        return out, *torch.autograd.grad(out.square().mean(), list(layer.parameters()))

    exact = outcome()
    with torch.autocast("cpu", torch.bfloat16):
        lower = outcome()
    for ours, right in zip(lower, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).abs().max() <= 0.05 * right.abs().max() + 1e-4


def test_a_compiled_model_follows_autocast():
    x, weight, bias = leaves((8, 6), (6, 6), (6,))

    def loss(x, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return bias_gelu(functional.linear(x, weight), bias).float().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(x, weight, bias), (x, weight, bias))
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias)), eager))
