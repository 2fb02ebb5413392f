"""Dropout between bias and residual: one mask for a seed everywhere, torch's accuracy, fresh and repeatable seeds."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import ReferenceBackend, use_backend
from ds_kernels.backends.plain.philox import element_numbers, philox
from ds_kernels.ops import bias_dropout_residual
from ds_kernels.ops.declare import NAMESPACE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS = getattr(torch.ops, NAMESPACE)
fixtures_do_not_change = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_the_authors_of_philox(words, key, expected):
    made = philox([torch.tensor(word) for word in words], tuple(torch.tensor(word) for word in key))
    assert " ".join(f"{int(word):08x}" for word in made) == expected


def run(backend, x, bias, residual, grad, p, seed):
    """Output, gradient of x, gradient of the bias."""
    forward = backend.find("bias_dropout_residual", CPU, x.dtype)
    backward = backend.find("bias_dropout_residual_backward", CPU, x.dtype)
    return forward(x, bias, residual, p, seed), *backward(grad, bias is not None, p, seed)


def tensors(rows, columns, dtype, offset=0, seed=0):
    """x, residual, gradient, each `offset` elements from an aligned address, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(3, rows * columns + offset, generator=generator).to(dtype)
    return [*(t[offset:].view(rows, columns) for t in flat), torch.randn(columns, generator=generator).to(dtype)]


@given(
    shape=st.sampled_from([(0, 5), (5, 0), (1, 1), (3, 7), (17, 8), (5, 131), (2, 520), (37, 260), (1, 2049)]),
    offset=st.integers(0, 3),
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.97, 1 - 2**-20]),
    with_bias=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
@fixtures_do_not_change
def test_the_bits_of_plain_torch(backend, shape, offset, seed, p, with_bias, dtype):
    x, residual, grad, bias = tensors(*shape, dtype, offset)
    args = x, bias if with_bias else None, residual, grad, p, torch.tensor(seed) if p else None
    (out, grad_x, grad_bias), expected = run(backend, *args), run(ReferenceBackend(), *args)
    assert torch.equal(out, expected[0])
    assert torch.equal(grad_x, expected[1])
    torch.testing.assert_close(grad_bias, expected[2])  # sums have an order of their own


def test_misaligned_masks_are_not_shifted(backend):
    ones = torch.ones(3, 67)
    numbers = element_numbers(torch.tensor(5), ones.numel()).view(3, 67)
    out = run(backend, ones, None, torch.zeros(3, 67), ones, 0.25, torch.tensor(5))[0]
    assert torch.equal(out == 0, numbers < 2**14)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [7, 65, 2500])
def test_error_is_at_most_twice_torchs(backend, dtype, rows):
    if type(backend).__name__ == "HostBackend" and rows > 100:
        rows = 600  # fibers are slow
    x, residual, grad, bias = tensors(rows, 67, dtype)
    seed = torch.tensor(3)
    stays = element_numbers(seed, x.numel()).view(x.shape) >= 2**13

    def composed(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, bias, residual)]
        out = leaves[2] + (leaves[0] + leaves[1]) * stays.to(dtype).div(0.875)  # as torch's own dropout does
        out.backward(grad.to(dtype))
        return out.detach(), leaves[0].grad, leaves[1].grad

    plain, exact = composed(dtype), composed(torch.float64)
    for ours, theirs, true in zip(run(backend, x, bias, residual, grad, 0.125, seed), plain, exact, strict=True):
        wrong, allowed = ((value.double() - true).abs().max() for value in (ours, theirs))
        assert wrong <= 2 * allowed


def test_same_bits_on_any_number_of_threads(cpu, threads):
    x, residual, grad, bias = tensors(1037, 131, torch.float32)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(cpu, x, bias, residual, grad, 0.1, torch.tensor(11)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_numbers_are_evenly_distributed_and_independent():
    numbers = element_numbers(torch.tensor(2), 1 << 16)
    counts = torch.bincount(numbers >> 8, minlength=256).double()
    assert 150 < ((counts - 256) ** 2 / 256).sum() < 380  # chi squared of 255 degrees: 255 +- 23
    for other in (element_numbers(torch.tensor(3), 1 << 16), numbers.roll(1), numbers.roll(8)):
        assert torch.corrcoef(torch.stack([numbers, other]).double())[0, 1].abs() < 0.015


def test_the_share_and_the_mean_are_kept():
    x = torch.ones(512, 512)
    for p in (0.1, 0.5, 0.9):
        out = bias_dropout_residual(x, None, torch.zeros_like(x), p)
        assert (out == 0).double().mean().item() == pytest.approx(p, abs=0.005)
        assert out.double().mean().item() == pytest.approx(1, abs=0.03)


def test_what_is_dropped_adds_nothing_whatever_it_is(backend):
    x = torch.full((4, 64), torch.inf)
    out = run(backend, x, torch.full((64,), torch.nan), torch.ones(4, 64), x, 0.5, torch.tensor(1))[0]
    assert torch.equal(out.nan_to_num(7.0).unique(), torch.tensor([1.0, 7.0]))


def test_seeds_are_fresh_and_come_from_torchs_generator():
    x, zeros = torch.ones(9, 100), torch.zeros(9, 100)

    def out():
        return bias_dropout_residual(x, None, zeros, 0.5)

    torch.manual_seed(1)
    first, second = out(), out()
    torch.manual_seed(1)
    assert torch.equal(out(), first)
    assert torch.equal(out(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("settings", [{"p": 0.0}, {"p": 0.5, "training": False}], ids=str)
def test_without_dropout_nothing_is_drawn(settings):
    x, residual, _, bias = tensors(5, 8, torch.float32)
    state = torch.get_rng_state()
    out = bias_dropout_residual(x, bias, residual, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, residual + (x + bias))


@pytest.mark.parametrize("with_bias", [False, True])
def test_with_p_of_1_all_is_dropped_and_gradients_are_0(with_bias):
    x, residual, _, bias = (t.requires_grad_() for t in tensors(5, 8, torch.float32))
    with torch.no_grad():
        x[0, 0] = float("inf")  # a dropped element adds nothing, whatever it was
    state = torch.get_rng_state()
    out = bias_dropout_residual(x, bias if with_bias else None, residual, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out, residual)
    wanted = (x, residual, bias) if with_bias else (x, residual)
    gradients = torch.autograd.grad(out.sum(), wanted)
    assert [gradient.sum().item() for gradient in gradients] == [0, out.numel(), 0][: len(wanted)]


def test_a_checkpoint_computes_the_same_bits_again():
    leaves = [t.requires_grad_() for t in tensors(9, 40, torch.float32)]

    def block(x, residual, _, bias):
        return bias_dropout_residual(bias_dropout_residual(x, bias, residual, 0.3).tanh(), bias, x, 0.3)

    results = []
    for again in (False, True):
        torch.manual_seed(4)
        out = checkpoint(block, *leaves, use_reentrant=False) if again else block(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaves[i] for i in (0, 1, 3)])])
    assert all(map(torch.equal, *results))


def test_only_the_seed_is_kept():
    x, residual, _, bias = (t.requires_grad_() for t in tensors(9, 40, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        bias_dropout_residual(x, bias, residual, 0.5)
    assert kept == [8]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(p, with_bias):
    x, residual, _, bias = (t.requires_grad_() for t in tensors(3, 5, torch.float32))
    seed = torch.tensor(7) if p else None
    torch.library.opcheck(OPS.bias_dropout_residual.default, (x, bias if with_bias else None, residual, p, seed))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_in_float64(p):
    leaves = [t.double().requires_grad_() for t in tensors(3, 5, torch.float32)]
    seed = torch.tensor(7)
    assert torch.autograd.gradcheck(lambda x, r, _, b: bias_dropout_residual(x, b, r, p, seed=seed), leaves)


def test_compiled_it_draws_the_seeds_of_eager_torch():
    x, residual, _, bias = (t.requires_grad_() for t in tensors(6, 10, torch.float32))

    def loss(x, bias, residual):
        return bias_dropout_residual(x, bias, residual, 0.5).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(function(x, bias, residual), (x, bias, residual)))
    assert all(map(torch.equal, *results))


def test_every_backend_is_one_to_the_op(cpu):
    x, residual, _, bias = tensors(6, 10, torch.bfloat16)
    outs = []
    for name in ("cpu", "reference"):
        with use_backend(name):
            outs.append(bias_dropout_residual(x.t().contiguous().t(), bias, residual, 0.5, seed=torch.tensor(1)))
    assert torch.equal(*outs)


def test_what_does_not_fit_is_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"bias must be one torch.float32 value for each of the 3 columns of x"):
        bias_dropout_residual(x, torch.ones(2), x, 0.1)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 of shape \(2, 3\), as x; got .* \(3,\)"):
        bias_dropout_residual(x, None, torch.ones(3), 0.1)
    with pytest.raises(ValueError, match=r"p must be at least 0 and at most 1; got 1\.5"):
        bias_dropout_residual(x, None, x, 1.5)
    with pytest.raises(ValueError, match=r"seed must be one int64 number on cpu, of shape \(\); got torch.int32"):
        bias_dropout_residual(x, None, x, 0.5, seed=torch.tensor(1, dtype=torch.int32))
