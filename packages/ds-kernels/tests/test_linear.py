"""Linear layers with a GELU: registered as torch wants, exact against torch, and the fused kernel's arguments."""

from __future__ import annotations

import pytest
import torch
from ds_kernels.backends.cutlass.backend import CutlassBackend
from ds_kernels.backends.cutlass.linear import swizzled
from ds_kernels.ops import gelu_mlp, linear_gelu
from ds_kernels.ops.declare import NAMESPACE
from torch.nn import functional


def tensors(*shape, columns=8, dtype=torch.float32):
    x, weight, bias = torch.randn(*shape), torch.randn(columns, shape[-1]), torch.randn(columns)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def test_opcheck():
    torch.library.opcheck(getattr(torch.ops, NAMESPACE).linear_gelu.default, tuple(tensors(3, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 16), (0, 4)], ids=str)
def test_values_and_gradients_are_torchs(shape, dtype):
    inputs = tensors(*shape, dtype=dtype)
    got, want = linear_gelu(*inputs), functional.gelu(functional.linear(*inputs))
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    right = torch.autograd.grad(functional.gelu(functional.linear(*exact)), exact, grad.double())
    torchs = torch.autograd.grad(want, inputs, grad)
    for ours, theirs, best in zip(torch.autograd.grad(got, inputs, grad), torchs, right):
        assert ours.dtype == theirs.dtype
        if best.numel():
            errors = [(t.double() - best).abs().max() for t in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * best.abs().max()


def layers(*shape, dtype=torch.float32, columns=8, out=3):
    inputs = tensors(*shape, columns=columns, dtype=dtype)
    return [*inputs, *(torch.randn(n).to(dtype).requires_grad_() for n in ((out, columns), out))]


def plain_mlp(x, weight_in, bias_in, weight_out, bias_out):
    return functional.linear(functional.gelu(functional.linear(x, weight_in, bias_in)), weight_out, bias_out)


@pytest.mark.parametrize("op", ["linear_after_gelu", "linear_dgelu"])
def test_opcheck_of_the_second_layer(op):
    _, _, _, weight, bias = (t.detach() for t in layers(4, 5))
    inside = torch.randn(4, 8)
    args = (torch.randn(4, 3), weight, inside)
    if op == "linear_after_gelu":  # its derivative is that of the inside, through which hidden was made
        args = (functional.gelu(inside), inside, weight.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACE), op).default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 16), (0, 4)], ids=str)
def test_two_layers_have_torchs_values_and_gradients(shape, dtype):
    inputs = layers(*shape, dtype=dtype)
    got, want = gelu_mlp(*inputs), plain_mlp(*inputs)
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    right = torch.autograd.grad(plain_mlp(*exact), exact, grad.double())
    torchs = torch.autograd.grad(want, inputs, grad)
    for ours, theirs, best in zip(torch.autograd.grad(got, inputs, grad), torchs, right):
        assert ours.dtype == theirs.dtype
        if best.numel():
            errors = [(t.double() - best).abs().max() for t in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * best.abs().max()


def test_what_is_inside_and_the_gelu_may_both_be_differentiated():
    x, weight, bias = tensors(3, 5)
    hidden, inside = getattr(torch.ops, NAMESPACE).linear_gelu(x, weight, bias)
    got = torch.autograd.grad((hidden * 2 + inside).sum(), (x, weight, bias))
    before = functional.linear(x, weight, bias)
    for ours, theirs in zip(got, torch.autograd.grad((functional.gelu(before) * 2 + before).sum(), (x, weight, bias))):
        torch.testing.assert_close(ours, theirs)


def test_two_layers_under_autocast_are_computed_in_its_type():
    inputs = layers(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = gelu_mlp(*inputs), plain_mlp(*inputs)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.parametrize("function", [linear_gelu, gelu_mlp])
def test_a_compiled_model_is_whole_and_gives_the_same_bits(function):
    inputs = tensors(4, 6) if function is linear_gelu else layers(4, 6)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (function, compiled)]
    assert all(map(torch.equal, *results))


def test_what_does_not_fit_is_named():
    x, weight, bias = tensors(3, 5)
    with pytest.raises(ValueError, match=r"\[..., k\], \[n, k\] and \[n\]; got \(3, 5\), \(8, 5\) and \(5,\)"):
        linear_gelu(x, weight, x[0])
    with pytest.raises(ValueError, match=r"one data type; got torch.float32, torch.float32 and torch.bfloat16"):
        linear_gelu(x, weight, bias.bfloat16())
    with pytest.raises(ValueError, match=r"weight_out and bias_out must be .* got \(3, 8\), \(8, 5\) and \(8,\)"):
        gelu_mlp(x, weight, bias, weight, bias)


class Launcher:
    """Keeps what it is asked to launch."""

    device_type = "cpu"

    def __init__(self):
        self.launched = []

    def unusable(self):
        return None

    def __call__(self, kernel, device, blocks, args):
        self.launched.append((kernel.name, kernel.shared, blocks, (args.rows, args.columns, args.inner)))


def test_the_fused_kernel_gets_sizes_and_a_grid_of_whole_tiles():
    launcher = Launcher()
    fused = CutlassBackend(launcher=launcher).find("linear_gelu", torch.device("cpu"), torch.bfloat16)
    fused(*(t.detach() for t in tensors(2, 100, 64, columns=1000, dtype=torch.bfloat16)))
    name = "linear_gelu_cutlass_bfloat16_t"
    assert launcher.launched == [(name, 65536, swizzled(2, 8), (200, 1000, 64))]
    assert swizzled(2, 8) == (16, 1)


def test_the_fused_gradient_gets_sizes_and_a_grid_of_whole_tiles():
    launcher = Launcher()
    fused = CutlassBackend(launcher=launcher).find("linear_dgelu", torch.device("cpu"), torch.float16)
    grad, weight, inside = (torch.randn(*shape).half() for shape in ((2, 100, 64), (64, 1000), (2, 100, 1000)))
    assert fused(grad, weight, inside).shape == inside.shape
    assert launcher.launched == [("linear_dgelu_cutlass_half_t", 65536, swizzled(2, 8), (200, 1000, 64))]


def test_rows_off_16_byte_units_are_computed_plainly():
    launcher = Launcher()
    fused = CutlassBackend(launcher=launcher).find("linear_gelu", torch.device("cpu"), torch.bfloat16)
    inputs = [t.detach() for t in tensors(3, 12, dtype=torch.bfloat16)]
    assert torch.equal(fused(*inputs)[0], functional.gelu(functional.linear(*inputs)))
    fused = CutlassBackend(launcher=launcher).find("linear_dgelu", torch.device("cpu"), torch.bfloat16)
    x, weight, _ = inputs
    inside = torch.randn(3, 12).bfloat16()
    grad = x @ weight.t()
    assert torch.equal(fused(grad, weight, inside), torch.ops.aten.gelu_backward(grad @ weight, inside))
    assert launcher.launched == []
