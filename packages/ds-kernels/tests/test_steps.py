"""Lion, Adagrad, SGD and LAMB: torch's numbers where torch has them, the same bits on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from ds_kernels import ReferenceBackend
from ds_kernels.hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper
from torch import Tensor

LENGTH = 4099
LONG = 70_001
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def backend(backend):
    """Every backend that has more than AdamW in float32."""
    if backend.find("lion", torch.device("cpu"), torch.float32) is None:
        pytest.skip(f"the backend {backend.name} has AdamW in float32 only")
    return backend


class Case(NamedTuple):
    """One optimizer's step: the op, its numbers, and the same in any precision from the textbook."""

    op: str
    hyper: Any
    formula: Callable[..., tuple[Tensor, Tensor]]  # (p, g, s) -> new p, new s


def lion(h: LionHyper):
    def step(p, g, m):
        c = h.beta1 * m + (1 - h.beta1) * g
        return p * (1 - h.lr * h.weight_decay) - h.lr * c.sign(), h.beta2 * m + (1 - h.beta2) * g

    return Case("lion", h, step)


def adagrad(h: AdagradHyper):
    def step(p, g, s):
        g = g + h.weight_decay * p
        s = s + g * g
        return p - h.lr / (1 + (h.step - 1) * h.lr_decay) * g / (s.sqrt() + h.eps), s

    return Case("adagrad", h, step)


def sgd(h: SgdHyper):
    def step(p, g, b):
        g = g + h.weight_decay * p
        b = g if h.first else h.momentum * b + (1 - h.dampening) * g
        return p - h.lr * (g + h.momentum * b if h.nesterov else b), b

    return Case("sgd", h, step)


CASES = [
    lion(LionHyper(lr=1e-2, weight_decay=0.1)),
    lion(LionHyper(lr=1e-2, beta1=0.3, beta2=0.0)),
    adagrad(AdagradHyper(step=4, lr=1e-2, lr_decay=0.1, weight_decay=0.1)),
    sgd(SgdHyper(lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1)),
    sgd(SgdHyper(lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True)),
    sgd(SgdHyper(lr=1e-2, momentum=0.9, dampening=0.5, first=True)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)


def tensors(numel: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter, a gradient over many orders of magnitude, and a positive state."""
    grad = torch.randn(numel) * torch.exp(3 * torch.randn(numel)) * 1e-2
    return torch.randn(numel), grad.to(dtype), torch.randn(numel).mul_(0.1).square_()


def run(backend, case: Case, p: Tensor, g: Tensor, s: Tensor, copy: Tensor | None = None, **hyper) -> list[Tensor]:
    """Step clones; return parameter and state, and the copy if there is one."""
    changed = type(case.hyper)(**{name: getattr(case.hyper, name) for name in case.hyper.__slots__} | hyper)
    p, s = p.clone(), s.clone()
    copy = None if copy is None else copy.clone()
    backend.find(case.op, CPU, p.dtype)(p, g, s, copy=copy, hyper=changed)
    return [p, s] if copy is None else [p, s, copy]


@cases
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_at_most_twice_that_of_torch_ops(backend, case, dtype):
    p, g, s = tensors(LENGTH, dtype)
    ours = run(backend, case, p, g, s, torch.zeros(LENGTH, dtype=torch.bfloat16), scale=0.25)
    exact = case.formula(p.double(), g.double() * 0.25, s.double())
    theirs = case.formula(p, g.float() * 0.25, s)
    for our, true, their in zip(ours, exact, theirs):
        assert (our - true).abs().max() <= 2 * (their - true).abs().max()
    assert torch.equal(ours[2], ours[0].bfloat16())


@cases
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
def test_the_same_bits_on_every_instruction_set(cpu_isas, case, dtype, copy_dtype):
    state = tensors(2053, dtype)
    copy = None if copy_dtype is None else torch.zeros(2053, dtype=copy_dtype)
    first, *others = [run(backend, case, *state, copy) for backend in cpu_isas]
    assert all(all(map(torch.equal, other, first)) for other in others)


@cases
def test_the_same_bits_on_two_threads_and_in_parts(cpu, case, threads):
    p, g, s = tensors(LONG, torch.bfloat16)
    threads(1)
    one = run(cpu, case, p, g, s)
    threads(2)
    assert all(map(torch.equal, run(cpu, case, p, g, s), one))
    part = slice(17, 3001)
    assert all(torch.equal(a, b[part]) for a, b in zip(run(cpu, case, p[part], g[part], s[part]), one))


@cases
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [0, 1, LENGTH, LONG])
def test_zeroing_the_gradient_changes_nothing_else(backend, case, dtype, numel):
    p, g, s = tensors(numel, dtype)
    expected = run(backend, case, p, g, s)
    kept = g.clone()
    assert torch.equal(g, kept)
    assert all(map(torch.equal, run(backend, case, p, g, s, zero_grad=True), expected))
    assert not g.count_nonzero()


@cases
def test_values_that_are_no_numbers_do_not_get_lost(backend, case):
    p, g, s = tensors(70)
    g[3], g[40] = torch.nan, torch.inf
    param, state = run(backend, case, p, g, s)
    assert param[3].isnan()
    assert state[3].isnan()
    assert not state[40].isfinite()
    others = torch.ones(70, dtype=torch.bool)
    others[[3, 40]] = False
    assert param[others].isfinite().all()


def test_plain_sgd_has_no_buffer(backend):
    step = backend.find("sgd", CPU, torch.float32)
    p, g, s = tensors(100)
    expected = p.add(g, alpha=-0.5)
    step(p, g, hyper=SgdHyper(lr=0.5))
    assert torch.equal(p, expected)
    with pytest.raises(ValueError, match=r"exactly where momentum is not 0; got a momentum_buffer and momentum 0.0"):
        step(p, g, s, hyper=SgdHyper(lr=0.5))


# LAMB #

LAMB = LambHyper(step=3, lr=1e-2, weight_decay=0.1, scale=0.5)


def lamb(backend, p, g, m, v, hyper=LAMB, ratio=0.7):
    p, m, v = p.clone(), m.clone(), v.clone()
    squares = backend.find("lamb_moments", CPU, p.dtype)(p, g, m, v, hyper=hyper)
    copy = torch.zeros(p.shape, dtype=torch.bfloat16)
    backend.find("lamb_step", CPU, p.dtype)(p, m, v, copy=copy, ratio=ratio, hyper=hyper)
    return [p, m, v, copy, squares]


def lamb_formula(p, g, m, v, h=LAMB, ratio=0.7):
    m = h.beta1 * m + (1 - h.beta1) * g
    v = h.beta2 * v + (1 - h.beta2) * g * g
    u = m / (1 - h.beta1**h.step) / ((v / (1 - h.beta2**h.step)).sqrt() + h.eps) + h.weight_decay * p
    return p - h.lr * ratio * u, m, v, torch.stack([p.square().sum(), u.square().sum()])


@pytest.mark.parametrize("numel", [1, 1024, LENGTH])
def test_lamb_is_as_exact_as_torch_ops(backend, numel):
    p, g, v = tensors(numel)
    m = torch.randn(numel) * 1e-2
    *ours, copy, squares = lamb(backend, p, g, m, v)
    *exact, squares_true = lamb_formula(*(x.double() for x in (p, g * 0.5, m, v)))
    *theirs, _ = lamb_formula(p, g * 0.5, m, v)
    for our, true, their in zip(ours, exact, theirs):
        assert (our - true).abs().max() <= 2 * (their - true).abs().max() + 1e-9
    assert torch.allclose(squares, squares_true, rtol=1e-6)
    assert torch.equal(copy, ours[0].bfloat16())


def test_lamb_has_the_same_bits_everywhere(cpu_isas, threads):
    p, g, v = tensors(LONG, torch.bfloat16)
    m = torch.randn(LONG) * 1e-2
    results = []
    for num in (1, 2):
        threads(num)
        results += [lamb(backend, p, g, m, v) for backend in cpu_isas]
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_lambs_norm_of_the_parameter_is_the_references(cpu):
    p, g, v = tensors(LENGTH)
    ours, theirs = (lamb(backend, p, g, v, v)[4] for backend in (cpu, ReferenceBackend()))
    assert ours[0] == theirs[0]


def test_lamb_of_nothing(backend):
    nothing = torch.zeros(0)
    assert torch.equal(lamb(backend, nothing, nothing, nothing, nothing)[4], torch.zeros(2, dtype=torch.float64))
