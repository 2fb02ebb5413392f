"""Linear layers with a GELU: registered as torch wants, exact against torch, and the fused kernel's arguments."""

from __future__ import annotations

import pytest
import torch
from ds_kernels.backends.cutlass.backend import CutlassBackend
from ds_kernels.backends.cutlass.linear import swizzled
from ds_kernels.ops import linear_gelu
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


def test_a_compiled_model_is_whole_and_gives_the_same_bits():
    inputs = tensors(4, 6)
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (linear_gelu, compiled)]
    assert all(map(torch.equal, *results))


def test_what_does_not_fit_is_named():
    x, weight, bias = tensors(3, 5)
    with pytest.raises(ValueError, match=r"\[..., k\], \[n, k\] and \[n\]; got \(3, 5\), \(8, 5\) and \(5,\)"):
        linear_gelu(x, weight, x[0])
    with pytest.raises(ValueError, match=r"one data type; got torch.float32, torch.float32 and torch.bfloat16"):
        linear_gelu(x, weight, bias.bfloat16())


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


def test_rows_off_16_byte_units_are_computed_plainly():
    launcher = Launcher()
    fused = CutlassBackend(launcher=launcher).find("linear_gelu", torch.device("cpu"), torch.bfloat16)
    inputs = [t.detach() for t in tensors(3, 12, dtype=torch.bfloat16)]
    assert torch.equal(fused(*inputs)[0], functional.gelu(functional.linear(*inputs)))
    assert launcher.launched == []
