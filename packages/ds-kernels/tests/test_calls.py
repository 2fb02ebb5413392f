"""Calls that cannot be answered: tensors on several devices, second derivatives, inputs that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
from torch import Tensor


def mean_loss(hidden, weight, bias):
    return linear_cross_entropy(hidden, weight, torch.zeros(2, dtype=torch.int64, device=hidden.device), bias)


def loss_per_token(hidden, weight, bias):
    target = torch.zeros(2, dtype=torch.int64, device=hidden.device)
    return linear_cross_entropy(hidden, weight, target, bias, reduction="none")


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "bias_gelu": (bias_gelu, [(2, 4), (4,)]),
    "bias_swiglu": (bias_swiglu, [(2, 4), (4,)]),
    "layer_norm": (lambda x, w, b, r: layer_norm(x, w, b, residual=r)[0], [(2, 4), (4,), (4,), (2, 4)]),
    "rms_norm": (lambda x, w, r: rms_norm(x, w, residual=r)[0], [(2, 4), (4,), (2, 4)]),
    "bias_dropout_residual": (lambda x, b, r: bias_dropout_residual(x, b, r, 0.0), [(2, 4), (4,), (2, 4)]),
    "masked_softmax_dropout": (masked_softmax_dropout, [(2, 4), (1, 4)]),
    "linear_gelu": (linear_gelu, [(2, 4), (3, 4), (3,)]),
    "linear_cross_entropy": (mean_loss, [(2, 4), (3, 4), (3,)]),
    "linear_cross_entropy_rows": (loss_per_token, [(2, 4), (3, 4), (3,)]),
}
ops = pytest.mark.parametrize("name", CALLS)


def operands(shapes: list[tuple[int, ...]], **how: Any) -> list[Tensor]:
    return [torch.randn(shape, **how) for shape in shapes]


@ops
@pytest.mark.parametrize("fake", [True, False])
def test_all_tensors_are_on_one_device(name, fake):
    call, shapes = CALLS[name]
    with torch._subclasses.FakeTensorMode() if fake else torch.no_grad():
        for stray in range(len(shapes)):
            tensors = operands(shapes)
            tensors[stray] = tensors[stray].to("meta")
            with pytest.raises(ValueError, match=rf"all tensors of {name} must be on one device; got .* on (cpu|meta)"):
                call(*tensors)


@ops
def test_shapes_are_known_without_memory(name):
    call, shapes = CALLS[name]
    assert call(*operands(shapes, device="meta")).device.type == "meta"


@ops
def test_a_second_derivative_is_an_error(name):
    call, shapes = CALLS[name]
    tensors = operands(shapes, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{name} can be differentiated once; got a backward pass through"):
        (gradient.square().sum() + tensors[1].sum()).backward()


@ops
def test_the_graph_of_a_first_derivative_may_be_kept(name):
    call, shapes = CALLS[name]
    tensors = operands(shapes, requires_grad=True)
    once = torch.autograd.grad(call(*tensors).sum(), tensors)
    kept = torch.autograd.grad(call(*tensors).sum(), tensors, create_graph=True)
    assert all(map(torch.equal, once, kept))


@ops
def test_an_input_that_does_not_fit_is_named(name):
    call, shapes = CALLS[name]
    rest = operands(shapes)[1:]
    with pytest.raises(TypeError, match=r"must be a torch.Tensor; got list; convert it with torch.as_tensor"):
        call([1.0, 2.0], *rest) if "cross" not in name else linear_cross_entropy([1.0], *rest[:1], torch.zeros(1))
    with pytest.raises(ValueError, match=r"must be of a floating-point type; got torch.int64"):
        call(torch.ones(shapes[0], dtype=torch.int64), *rest)
    with pytest.raises(ValueError, match=r"must have at least one dimension; got a single number"):
        call(torch.tensor(1.0), *rest)


def test_a_seed_is_a_tensor():
    with pytest.raises(TypeError, match=r"seed must be a torch.Tensor.*got int; pass torch.tensor\(3, device=x.device"):
        bias_dropout_residual(torch.ones(2, 2), None, torch.ones(2, 2), 0.5, seed=3)
