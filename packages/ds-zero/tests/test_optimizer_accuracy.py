"""Each optimizer against its formula, written down once more in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from ds_zero.optim import Lamb, Lars, Muon
from ds_zero.optim.muon import orthogonalized
from torch import Tensor, nn

STEPS = 12
SHAPES = ((7, 5), (4, 9), (6,), (1,))


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator) for _ in range(STEPS)]


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(params)
    for grads in zip(*[gradients(shape) for shape in SHAPES], strict=True):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


def assert_follows(got: list[Tensor], formula: Callable[[Tensor, list[Tensor]], Tensor], rtol: float = 1e-5) -> None:
    torch.manual_seed(1)
    start = [torch.randn(shape) for shape in SHAPES]
    for value, first, shape in zip(got, start, SHAPES, strict=True):
        want = formula(first.double(), [grad.double() for grad in gradients(shape)])
        assert (value - want).norm() <= rtol * (first.double() - want).norm(), shape
        assert (first.double() - want).norm() > 0


def lamb(w: Tensor, grads: list[Tensor]) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        u = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6) + 0.1 * w
        w = w - 0.02 * min(max(float(w.norm() / u.norm()), 0.05), 0.9) * u
    return w


def test_lamb() -> None:
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "coeff": (0.05, 0.9)}
    assert_follows(stepped(lambda params: Lamb(params, **settings)), lamb)


def lars(w: Tensor, grads: list[Tensor]) -> Tensor:
    v = torch.zeros_like(w)
    for g in grads:
        rate = 0.5 * 0.02 * w.norm() / (g.norm() + 0.1 * w.norm())
        v = 0.9 * v + rate * (g + 0.1 * w)
        w = w - v
    return w


def test_lars() -> None:
    assert_follows(stepped(lambda params: Lars(params, lr=0.5, weight_decay=0.1, trust=0.02)), lars)


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_a_tensor_of_zeros_and_a_group_that_is_not_adapted_take_plain_steps(kind: type[Lamb] | type[Lars]) -> None:
    zeros, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    settings = {"lr": 0.5, "momentum": 0.0} if kind is Lars else {"lr": 0.5, "eps": 0.0}
    optimizer = kind([{"params": [zeros]}, {"params": [other], "adaptive": False}], **settings)  # type: ignore[arg-type]
    zeros.grad, other.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.allclose(zeros.detach(), torch.full((3,), -0.5))
    assert torch.allclose(other.detach(), torch.full((3,), 0.5))


def newton_schulz(x: Tensor) -> Tensor:
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def muon(w: Tensor, grads: list[Tensor]) -> Tensor:
    if w.dim() < 2:
        return adamw(w, grads)
    m = torch.zeros_like(w)
    for g in grads:
        m = 0.95 * m + 0.05 * g
        w = w * (1 - 0.02 * 0.1) - 0.02 * math.sqrt(max(1, w.shape[0] / w.shape[1])) * newton_schulz(
            0.95 * m + 0.05 * g
        )
    return w


def adamw(w: Tensor, grads: list[Tensor]) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w = w * (1 - 0.003 * 0.1) - 0.003 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10)
    return w


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_muon_and_its_adamw(dtype: str, rtol: float) -> None:
    settings = {"lr": 0.02, "weight_decay": 0.1, "adam_lr": 0.003, "ns_dtype": dtype}
    assert_follows(stepped(lambda params: Muon(params, **settings)), muon, rtol)


@pytest.mark.parametrize("shape", [(16, 16), (40, 10), (10, 40)])
def test_newton_schulz_brings_singular_values_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    got = torch.linalg.svdvals(orthogonalized(matrix, 5, torch.float32))
    large = values > 0.1 * values.max()  # five steps do not lift the smallest ones all the way
    assert float(got.max()) < 1.25
    assert float(got[large].min()) > 0.6
    aligned = (orthogonalized(matrix, 5, torch.float32) * (left @ right)).sum() / min(shape)
    assert float(aligned) > 0.8


def test_muon_flattens_convolutions() -> None:
    kernel, matrix = nn.Parameter(torch.randn(6, 4, 3)), nn.Parameter(torch.empty(6, 12))
    matrix.data.copy_(kernel.detach().view(6, 12))
    kernel.grad = torch.randn(6, 4, 3)
    matrix.grad = kernel.grad.view(6, 12).clone()
    Muon([kernel, matrix]).step()
    assert torch.equal(kernel.detach().view(6, 12), matrix.detach())


def adafactor(w: Tensor, grads: list[Tensor]) -> Tensor:
    """As torch has it: the first moment is left out, and the step is relative to the parameter."""
    row = column = variance = 0.0
    for t, g in enumerate(grads, start=1):
        decay = t**-0.8
        rho = min(0.05, 1 / math.sqrt(t))
        step = max(1e-3, float(w.norm()) / math.sqrt(w.numel())) * rho
        if w.dim() > 1:
            row = (1 - decay) * row + decay * g.square().mean(dim=1, keepdim=True)
            column = (1 - decay) * column + decay * g.square().mean(dim=0, keepdim=True)
            second = row @ column / row.mean().clamp(min=1e-30)
        else:
            second = variance = (1 - decay) * variance + decay * g.square()
        u = g / second.clamp(min=torch.finfo(torch.float32).eps ** 2).sqrt()
        w = w - step * u / max(1.0, float(u.norm()) / math.sqrt(u.numel()))
    return w


def test_adafactor() -> None:
    assert_follows(stepped(lambda params: torch.optim.Adafactor(params, lr=0.05, weight_decay=0.0)), adafactor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: Lamb(params, lr=-1.0), "lr must not be negative; got -1.0"),
        (lambda params: Lamb(params, betas=(0.9, 1.0)), r"betas\[1\] must be at least 0 and below 1; got 1.0"),
        (lambda params: Lars(params, trust=-0.1), "trust must not be negative"),
        (lambda params: Muon(params, momentum=1.0), "momentum must be at least 0 and below 1"),
        (lambda params: Muon([{"params": params, "use_muon": True}]), r"Muon steps matrices; got .* shapes \[\[2\]\]"),
        (lambda params: Muon([{"params": params, "use_muon": None}]), "use_muon of a parameter group is true or false"),
    ],
)
def test_settings_out_of_bounds_are_refused(make: Callable[[list[nn.Parameter]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("kind", [Lamb, Lars, Muon])
def test_a_closure_and_a_state_dict_work_as_torch_has_them(kind: type[torch.optim.Optimizer]) -> None:
    def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum((param.square().sum() for param in params), torch.zeros(()))
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        assert loss is not None
        assert torch.as_tensor(loss).detach() > 0

    first = [nn.Parameter(torch.arange(1.0, 7).view(2, 3)), nn.Parameter(torch.ones(2))]
    optimizer = kind(first)  # type: ignore[call-arg]
    run(first, optimizer)
    second = [nn.Parameter(param.detach().clone()) for param in first]
    resumed = kind(second)  # type: ignore[call-arg]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(first, optimizer)
    run(second, resumed)
    assert all(map(torch.equal, first, second))
