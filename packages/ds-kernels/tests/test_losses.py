"""The loss over a vocabulary: torch's values and gradients, without the logits of all tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from ds_kernels import CpuBackend, Registry, registry
from ds_kernels.backends.linear_cross_entropy import Terms
from ds_kernels.backends.native.losses import cross_entropy
from ds_kernels.backends.native.module import native
from ds_kernels.ops import linear_cross_entropy
from ds_kernels.ops.declare import NAMESPACE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPS = getattr(torch.ops, NAMESPACE)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def on_backend(backend):
    """Run the ops on each backend, the cpu one once for each instruction set."""
    registry().put_back(backend)
    yield backend
    registry().put_back(None)


def problem(tokens=13, vocabulary=97, features=6, dtype=torch.float32, ignored=3):
    hidden, weight = torch.randn(tokens, features), torch.randn(vocabulary, features)
    target = torch.randint(vocabulary, (tokens,))
    target[: min(ignored, tokens)] = -100
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, torch.randn(vocabulary))], target


def torchs(hidden, weight, bias, target, *, z_loss=0.0, reduction="mean", **settings):
    logits = functional.linear(hidden, weight, bias)
    losses = functional.cross_entropy(logits, target, reduction="none", **settings)
    if z_loss:
        counted = target != settings.get("ignore_index", -100)
        losses = losses + z_loss * torch.where(counted, logits.logsumexp(-1).square(), 0)
    if reduction == "mean":
        return losses.sum() / (target != settings.get("ignore_index", -100)).sum()
    return losses.sum() if reduction == "sum" else losses


def ours(hidden, weight, bias, target, **settings):
    return linear_cross_entropy(hidden, weight, target, bias, **settings)


def results(loss, operands, target, upstream, dtype, **settings):
    """The loss and its gradients, computed in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in operands]
    value = loss(*leaves, target, **settings)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def error(got, exact):
    return (got.double() - exact).norm().item()


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"ignore_index": 5}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_more_than_twice_the_error_of_torch(on_backend, dtype, reduction, settings):
    operands, target = problem(70, 1031, 33, dtype, ignored=0 if "ignore_index" in settings else 3)
    target[::9] = settings.get("ignore_index", -100)
    upstream = torch.rand(70) if reduction == "none" else torch.tensor(0.75)
    settings = {**settings, "reduction": reduction}
    exact = results(torchs, operands, target, upstream, torch.float64, **settings)
    plain = results(torchs, operands, target, upstream, dtype, **settings)
    for got, theirs, true in zip(results(ours, operands, target, upstream, dtype, **settings), plain, exact):
        floor = torch.finfo(torch.float32).eps * true.norm().item()
        assert error(got, true) <= 2 * error(theirs, true) + floor


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_is_checked_by_differences(reduction):
    operands, target = problem(5, 7, 3, torch.float64, ignored=1)
    settings = {"label_smoothing": 0.2, "z_loss": 0.1, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda *leaves: ours(*leaves, target, **settings), operands)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_bits_on_every_instruction_set_and_thread_count(cpu_isas, threads, dtype):
    logits = (torch.randn(9, 5003) * 4).to(dtype)
    target, scales = torch.randint(5003, (9,)), torch.rand(9)
    target[4] = -100
    logits[2, 7] = -torch.inf
    found = []
    for backend, count in itertools.product(cpu_isas, (1, 2)):
        threads(count)
        found.append(one_pass(backend, logits, target, scales))
    for losses, gradient in found[1:]:
        assert torch.equal(losses, found[0][0])
        assert torch.equal(gradient, found[0][1])


def one_pass(backend: CpuBackend, logits, target, scales):
    """The native pass by itself: products of matrices are torch's, and their bits torch's matter."""
    losses, gradient = torch.empty(len(logits)), logits.clone()
    terms = Terms(-100, 0.1, 1e-3)
    cross_entropy(native(backend.isa), gradient, target, terms, losses, scales=scales, differentiate=True)
    return losses, gradient


@given(st.integers(0, 9), st.integers(1, 200), st.integers(1, 5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_size(on_backend, tokens, vocabulary, features):
    operands, target = problem(tokens, vocabulary, features, ignored=0)
    exact = results(torchs, operands, target, torch.tensor(1.0), torch.float64, reduction="sum")
    got = results(ours, operands, target, torch.tensor(1.0), torch.float32, reduction="sum")
    for one, true in zip(got, exact):
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-4)


def test_several_chunks_are_one(on_backend):
    operands, target = problem(700, 50, 6)
    exact = results(torchs, operands, target, torch.tensor(1.0), torch.float64)
    for got, true in zip(results(ours, operands, target, torch.tensor(1.0), torch.float32), exact):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learns", list(itertools.product([True, False], repeat=3)))
def test_only_the_gradients_that_are_wanted(on_backend, learns, reduction):
    operands, target = problem()
    for tensor, flag in zip(operands, learns):
        tensor.requires_grad_(flag)
    loss = ours(*operands, target, reduction=reduction)
    assert loss.requires_grad == any(learns)
    if any(learns):
        loss.sum().backward()
    assert [tensor.grad is not None for tensor in operands] == list(learns)


def test_nothing_is_differentiated_without_need():
    (hidden, weight, _), target = problem()
    asked = []
    plain = registry().kernel("linear_cross_entropy", torch.device("cpu"), torch.float32)

    class Recorder:
        name = "recorder"

        def find(self, op, device, dtype):
            return lambda *args: asked.append(args[-1]) or plain(*args)

    registry().put_back(Recorder())
    try:
        linear_cross_entropy(hidden, weight.detach(), target)
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, target)
    finally:
        registry().put_back(None)
    assert asked == [[True, False, False], [False, False, False]]


def test_a_weight_used_twice(on_backend):
    (_, weight, _), target = problem(features=6)
    tokens = torch.randint(97, (13,))

    def loss(function, dtype):
        leaf = weight.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(function(functional.embedding(tokens, leaf), leaf, None, target), leaf)[0]

    torch.testing.assert_close(loss(ours, torch.float32).double(), loss(torchs, torch.float64), rtol=1e-5, atol=1e-6)


def test_leading_dimensions_and_views(on_backend):
    (hidden, weight, bias), target = problem(12, 97, 6)
    flat = ours(hidden, weight, bias, target, reduction="none")
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0].view(3, 4, 6)
    assert not strided.is_contiguous()
    assert torch.equal(ours(strided, weight, bias, target.view(3, 4), reduction="none"), flat.view(3, 4))
    every_second = torch.stack([target, target], dim=1)[:, 0]
    again = ours(hidden, weight.t().contiguous().t(), bias, every_second, reduction="none")
    torch.testing.assert_close(again, flat)  # torch multiplies a transposed matrix in another order


def test_special_values(on_backend):
    hidden = torch.tensor([[1.0], [torch.nan], [1.0], [1.0]], requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, 1.0])
    losses = linear_cross_entropy(hidden, torch.ones(3, 1), torch.tensor([0, 0, 1, -100]), bias, reduction="none")
    assert losses[0].isfinite()
    assert losses[1].isnan()
    assert losses[2] == torch.inf
    assert losses[3] == 0
    losses.sum().backward()
    assert hidden.grad[1].isnan()
    assert hidden.grad[3] == 0
    assert hidden.grad[0].isfinite()


def test_large_logits_do_not_overflow(on_backend):
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]), reduction="none")
    assert loss.tolist() == [0.0, 2e4]


def test_the_mean_over_no_token(on_backend):
    operands, target = problem(4, ignored=4)
    loss = ours(*operands, target)
    loss.backward()
    assert loss.isnan()
    assert all(tensor.grad.count_nonzero() == 0 for tensor in operands)


def test_a_second_derivative_is_refused(on_backend):
    operands, target = problem()
    for reduction in ("sum", "none"):
        loss = ours(*operands, target, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss * operands[0].square().sum(), operands[:1], create_graph=True)
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy.* can be differentiated once"):
            gradient.sum().backward()


def test_the_graph_can_be_kept(on_backend):
    operands, target = problem()
    loss = ours(*operands, target)
    first = torch.autograd.grad(loss, operands, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, operands), first))


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias):
    (hidden, weight, bias), target = problem()
    operands = hidden, weight, target, bias if with_bias else None, -100, 0.1, 1e-3
    torch.library.opcheck(OPS.linear_cross_entropy.default, (*operands, [True, True, with_bias]))
    torch.library.opcheck(OPS.linear_cross_entropy_rows.default, operands)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in operands]
    wanted = [True, True, with_bias]
    torch.library.opcheck(OPS.linear_cross_entropy_rows_backward.default, (*plain, torch.rand(13), wanted))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction):
    operands, target = problem()

    def loss(hidden, weight, bias):
        return ours(hidden * 2, weight, bias, target, reduction=reduction).square().sum()

    eager = torch.autograd.grad(loss(*operands), operands)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(*operands), operands), eager))


class Sizes(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation of torch returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


def test_the_logits_of_all_tokens_never_exist(backend):
    (hidden, weight, _), target = problem(2048, 501, 8)
    # Not through the op: what happens inside one is hidden from the mode.
    kernel = registry().kernel("linear_cross_entropy", hidden.device, hidden.dtype, backend)
    with torch.no_grad(), Sizes() as sizes:
        kernel(hidden, weight, target, None, -100, 0.0, 0.0, [True, True, False])
    assert sizes.largest == 256 * 501


def test_what_does_not_fit_is_named():
    (hidden, weight, bias), target = problem()
    with pytest.raises(ValueError, match=r"weight must be \[vocabulary, features\].*\(97, 5\)"):
        linear_cross_entropy(hidden, weight[:, :5], target)
    with pytest.raises(ValueError, match=r"target must be one torch.int64 class.*torch.int32"):
        linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match=r"bias must be one value for each of 97 classes; got shape \(96,\)"):
        linear_cross_entropy(hidden, weight, target, bias[:96])
    with pytest.raises(ValueError, match=r"of one floating-point type; got torch\.bfloat16, torch\.float32"):
        linear_cross_entropy(hidden, weight.bfloat16(), target)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none'; got 'max'"):
        linear_cross_entropy(hidden, weight, target, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing must be in 0 ... 1; got 1.5"):
        linear_cross_entropy(hidden, weight, target, label_smoothing=1.5)


@pytest.mark.parametrize("wrong", [97, -1])
def test_a_target_that_is_no_class_is_named(on_backend, wrong):
    (hidden, weight, _), target = problem()
    target[7] = wrong
    with pytest.raises(ValueError, match=rf"classes 0 \.\.\. 96 or ignore_index=-100; got {wrong} at token 7"):
        linear_cross_entropy(hidden, weight, target)


def test_the_reference_has_it_for_other_devices_and_types():
    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
        assert Registry().provider("linear_cross_entropy", torch.device(device), dtype) == "reference"
