"""Ops for models: registered as torch wants, exact against float64, run by the chosen backend, compiled."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import ReferenceBackend, Registry, registry
from ds_kernels.ops import bias_gelu
from ds_kernels.ops.declare import NAMESPACE

OPS = getattr(torch.ops, NAMESPACE)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(approximate, with_bias):
    x = torch.randn(3, 5, requires_grad=True)
    bias = torch.randn(5, requires_grad=True) if with_bias else None
    torch.library.opcheck(OPS.bias_gelu.default, (x, bias, approximate))


def test_a_compiled_model_is_whole_and_gives_the_same_bits():
    def loss(x, bias):
        return bias_gelu(x, bias).square().sum()

    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    eager = torch.autograd.grad(loss(x, bias), (x, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, bias), (x, bias)), eager))


class Recorder:
    """Runs the reference's kernels, and keeps the names of the ops."""

    name = "recorder"

    def __init__(self):
        self.ops = []

    def find(self, op, device, dtype):
        kernel = ReferenceBackend().find(op, device, dtype)

        def recorded(*args):
            self.ops.append(op)
            return kernel(*args)

        return recorded


def test_the_chosen_backend_runs_also_where_a_model_was_compiled_before():
    x, recorder = torch.randn(2, 3), Recorder()
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="eager")
    compiled(x)
    registry().put_back(recorder)
    try:
        bias_gelu(x)
        compiled(x)
    finally:
        registry().put_back(None)
    bias_gelu(x)
    assert recorder.ops == ["bias_gelu", "bias_gelu"]


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"one torch.float32 value for each of the 3 columns of x; got .* \(2,\)"):
        bias_gelu(torch.ones(1, 3), torch.ones(2))
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'; got 'erf'"):
        bias_gelu(torch.ones(3), approximate="erf")


def test_an_op_without_a_backend_of_its_own_takes_the_reference():
    assert Registry().provider("bias_gelu", torch.device("meta"), torch.float32) == "reference"
