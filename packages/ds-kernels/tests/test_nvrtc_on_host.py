"""The GPU kernels' sources, run on the CPU: the bits of the cpu backend, every instance, any alignment and length."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import AdamHyper, ReferenceBackend
from ds_kernels.backends.nvrtc import activations
from ds_kernels.backends.nvrtc.optimizers import AdamArgs
from ds_kernels.backends.nvrtc.steps import step_kernel

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_a_step_has_the_bits_of_the_cpu(cpu, on_host, adam_state, grad_dtype, copy_dtype, decoupled):
    state = adam_state(1031, grad_dtype, copy_dtype)
    for beta1 in (0.9, 0.3):  # on both sides of one half, where interpolation starts from the other end
        hyper = AdamHyper(step=2, lr=1e-3, beta1=beta1, weight_decay=0.1, decoupled=decoupled, scale=1 / 3)
        assert state.stepped(on_host, hyper).same_bits(state.stepped(cpu, hyper))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_steps_have_the_same_bits(cpu, on_host, adam_state, hyper, offset):
    state = adam_state(300, torch.bfloat16, torch.float16)
    cut = state.clone().map(lambda t: t[offset:])
    want = state.stepped(cpu, hyper).map(lambda t: t[offset:])
    assert cut.run(on_host, hyper).same_bits(want)


def test_nothing_beyond_the_end_is_written(on_host, adam_state, hyper):
    state = adam_state(64, torch.float16, torch.bfloat16)
    for numel in (1, 2, 3, 4, 5, 61):
        stepped = state.clone()
        stepped.map(lambda t, numel=numel: t[:numel]).run(on_host, hyper)
        assert stepped.map(lambda t, numel=numel: t[numel:]).same_bits(state.map(lambda t, numel=numel: t[numel:]))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_have_the_bits_of_the_cpu(cpu, on_host, dtype, out_dtype):
    for num_pieces in (1, 3, 8, 9, 70):
        pieces = list(torch.randn(num_pieces, 67).to(dtype))
        got, want = torch.empty(67, dtype=out_dtype), torch.empty(67, dtype=out_dtype)
        on_host.tree_sum(got, pieces)
        cpu.tree_sum(want, pieces)
        assert torch.equal(got, want)


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 7, 12, 21, 64, 100, 1023, 1024, 1025, 1026, 4096])
def test_sums_of_squares_have_the_bits_of_the_cpu(cpu, on_host, leaves):
    for dtype in FLOATS if leaves < 100 else FLOATS[:1]:  # a block is slow on the CPU
        x = torch.randn(2 * leaves * 64).to(dtype)
        assert torch.equal(on_host.chunk_sumsq(x, leaves * 64), cpu.chunk_sumsq(x, leaves * 64))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (37, 260), (2, 3, 131), (0, 4), (600, 8)])
def test_bias_gelu_is_as_exact_as_torch(on_host, shape, with_bias, approximate):
    for dtype in FLOATS:
        x, grad = torch.randn(2, *shape).to(dtype)
        bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
        exact = [None if t is None else t.double() for t in (grad, x, bias)]
        plain = ReferenceBackend()
        for op, inputs in (("bias_gelu", 1), ("bias_gelu_backward", 0)):
            kernel = plain.find(op, x.device, dtype)
            want = _list(kernel(*exact[inputs:], approximate))
            torchs = _list(kernel(*(grad, x, bias)[inputs:], approximate))
            got = _list(getattr(on_host, op)(*(grad, x, bias)[inputs:], approximate))
            for ours, theirs, right in zip(got, torchs, want):
                assert ours.dtype == theirs.dtype
                assert ours.shape == theirs.shape
                assert _error(ours, right) <= 2 * _error(theirs, right) + _unit(right, dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (37, 260), (2, 3, 131), (0, 4), (600, 8)])
def test_bias_swiglu_is_as_exact_as_torch(on_host, shape, with_bias):
    for dtype in FLOATS:
        x, grad = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype), torch.randn(shape).to(dtype)
        bias = torch.randn(2 * shape[-1]).to(dtype) if with_bias else None
        exact = [None if t is None else t.double() for t in (grad, x, bias)]
        plain = ReferenceBackend()
        for op, inputs in (("bias_swiglu", 1), ("bias_swiglu_backward", 0)):
            kernel = plain.find(op, x.device, dtype)
            results = _list(getattr(on_host, op)(*(grad, x, bias)[inputs:])), _list(kernel(*(grad, x, bias)[inputs:]))
            for ours, theirs, right in zip(*results, _list(kernel(*exact[inputs:]))):
                assert ours.dtype == theirs.dtype
                assert ours.shape == theirs.shape
                assert _error(ours, right) <= 2 * _error(theirs, right) + _unit(right, dtype)


def test_what_does_not_lie_on_the_device_is_named(on_host, hyper):
    other = [torch.zeros(12, device="meta") for _ in range(4)]
    with pytest.raises(ValueError, match=r"the backend 'nvrtc' works on tensors in host memory; got param on meta"):
        on_host.adamw(*other, copy=None, hyper=hyper)


def test_every_op_has_a_name_that_c_accepts():
    kernels = [
        step_kernel("AdamW", AdamArgs, ("Float32", "Float16", "None", "Float32", "Float32")),
        activations.bias_gelu_kernel(FLOATS[0], "tanh", backward=True),
    ]
    names = ["step_AdamW_Float32_Float16_None_Float32_Float32", "bias_gelu_Float32_Tanh_true"]
    assert [kernel.name for kernel in kernels] == names


def _list(result):
    return list(result) if isinstance(result, tuple) else [result]


def _error(got, exact):
    return float((got.double() - exact).abs().max()) if got.numel() else 0.0


def _unit(exact, dtype):
    """A quarter of the last place of the largest value: where torch happens to be exact, rounding is not an error."""
    return torch.finfo(dtype).eps / 4 * float(exact.abs().max()) if exact.numel() else 0.0
