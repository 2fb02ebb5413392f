"""Optimizer steps on the GPU: one launch for each tensor, one pass over memory, whatever the codecs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import NOTHING, Beside, check_adam, check_step
from ..plain.optimizers import SQUARE_CHUNK, check_momentum, sum_chunks
from .launcher import Launcher
from .steps import LerpWeight, Step, StepArgs, Tensors, run_step

if TYPE_CHECKING:
    from ds_core.kernel_protocols import AdamHyper

    from ...hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper


def _floats(*names: str) -> tuple[tuple[str, type[ctypes.c_float]], ...]:
    return tuple((name, ctypes.c_float) for name in names)


# The scalars of cuda/step_formulas.cuh.


class AdamArgs(StepArgs):
    """Argument of Adam's step."""

    _fields_ = (
        *_floats("scale", "decay"),
        ("grad_weight", LerpWeight),
        *_floats("beta2", "one_minus_beta2", "eps", "minus_step_size"),
    )


class LionArgs(StepArgs):
    """Argument of Lion's step."""

    _fields_ = (
        *_floats("scale", "decay"),
        *((name, LerpWeight) for name in ("direction_weight", "moment_weight")),
        *_floats("minus_lr"),
    )


class AdagradArgs(StepArgs):
    """Argument of Adagrad's step."""

    _fields_ = _floats("scale", "weight_decay", "eps", "minus_lr")


class SgdArgs(StepArgs):
    """Argument of SGD's step."""

    _fields_ = _floats("scale", "weight_decay", "momentum", "grad_weight", "look_ahead", "minus_lr")


class LambArgs(StepArgs):
    """Argument of both phases of LAMB's step."""

    _fields_ = (
        *_floats("scale"),
        ("grad_weight", LerpWeight),
        *_floats("beta2", "one_minus_beta2", "eps", "moment_factor", "weight_decay", "minus_lr"),
    )


_MOMENTS = "Signed", "Roots"
FORMULAS: Mapping[str, tuple[type[StepArgs], tuple[str, ...]]] = MappingProxyType(
    {
        "Adam": (AdamArgs, _MOMENTS),
        "AdamW": (AdamArgs, _MOMENTS),
        "Lion": (LionArgs, ("Signed",)),
        "Adagrad": (AdagradArgs, ("Roots",)),
        "Sgd": (SgdArgs, ()),
        "SgdMomentum": (SgdArgs, ("Signed",)),
        "SgdNesterov": (SgdArgs, ("Signed",)),
        "LambMoments": (LambArgs, _MOMENTS),
        "LambStep": (LambArgs, _MOMENTS),
    }
)
"""By name in ``cuda/step_formulas.cuh``: the argument, and how states of 8 bits are stored."""


def adamw(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: AdamHyper,
    beside: Beside = NOTHING,
) -> None:
    """Do one Adam or AdamW step, in place; the bits are those of the cpu backend. See :class:`CpuBackend`."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, grad, states, copy, beside)
    decoupled = hyper.decoupled or hyper.weight_decay == 0
    bias2_root = math.sqrt(1.0 - hyper.beta2**hyper.step)
    numbers = (
        hyper.scale,
        1.0 - hyper.lr * hyper.weight_decay if decoupled else hyper.weight_decay,
        LerpWeight.of(hyper.beta1),
        hyper.beta2,
        1.0 - hyper.beta2,
        hyper.eps * bias2_root,
        -(hyper.lr / (1.0 - hyper.beta1**hyper.step)) * bias2_root,
    )
    step = Step("AdamW" if decoupled else "Adam", AdamArgs, numbers, hyper.zero_grad)
    run_step(launch, step, Tensors(param, grad, states, copy, beside))


def _adamw_in_float32(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: AdamHyper,
) -> None:
    """Do the step of the op ``adamw``, whose state is float32 on every backend."""
    check_adam(param, grad, exp_avg, exp_avg_sq, copy)
    adamw(launch, param, grad, exp_avg, exp_avg_sq, copy=copy, hyper=hyper)


def lion(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: LionHyper,
    beside: Beside = NOTHING,
) -> None:
    """See :func:`ds_kernels.backends.plain.optimizers.lion`."""
    states = {"exp_avg": exp_avg}
    check_step(param, grad, states, copy, beside)
    weights = LerpWeight.of(hyper.beta1), LerpWeight.of(hyper.beta2)
    numbers = (hyper.scale, 1.0 - hyper.lr * hyper.weight_decay, *weights, -hyper.lr)
    run_step(launch, Step("Lion", LionArgs, numbers, hyper.zero_grad), Tensors(param, grad, states, copy, beside))


def adagrad(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    total: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: AdagradHyper,
    beside: Beside = NOTHING,
) -> None:
    """See :func:`ds_kernels.backends.plain.optimizers.adagrad`."""
    states = {"sum": total}
    check_step(param, grad, states, copy, beside)
    minus_lr = -hyper.lr / (1.0 + (hyper.step - 1.0) * hyper.lr_decay)
    numbers = (hyper.scale, hyper.weight_decay, hyper.eps, minus_lr)
    run_step(launch, Step("Adagrad", AdagradArgs, numbers, hyper.zero_grad), Tensors(param, grad, states, copy, beside))


def sgd(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    copy: Tensor | None = None,
    hyper: SgdHyper,
    beside: Beside = NOTHING,
) -> None:
    """See :func:`ds_kernels.backends.plain.optimizers.sgd`."""
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    check_step(param, grad, states, copy, beside)
    check_momentum(momentum_buffer, hyper)
    momentum, grad_weight = (0.0, 1.0) if hyper.first else (hyper.momentum, 1.0 - hyper.dampening)
    numbers = (hyper.scale, hyper.weight_decay, momentum, grad_weight, hyper.momentum, -hyper.lr)
    formula = "Sgd" if hyper.momentum == 0 else "SgdNesterov" if hyper.nesterov else "SgdMomentum"
    run_step(launch, Step(formula, SgdArgs, numbers, hyper.zero_grad), Tensors(param, grad, states, copy, beside))


def lamb_moments(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    hyper: LambHyper,
    beside: Beside = NOTHING,
) -> Tensor:
    """See :func:`ds_kernels.backends.plain.optimizers.lamb_moments`."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, grad, states, None, beside)
    chunks = -(-param.numel() // SQUARE_CHUNK)
    squares = torch.empty(chunks, 2, dtype=torch.float64, device=param.device)
    step = Step("LambMoments", LambArgs, _lamb_numbers(hyper, 1.0), hyper.zero_grad)
    run_step(launch, step, Tensors(param, grad, states, None, beside, squares))
    return sum_chunks(squares.t())


def lamb_step(
    launch: Launcher,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None = None,
    ratio: float,
    hyper: LambHyper,
    beside: Beside = NOTHING,
) -> None:
    """See :func:`ds_kernels.backends.plain.optimizers.lamb_step`."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, None, states, copy, beside)
    step = Step("LambStep", LambArgs, _lamb_numbers(hyper, ratio))
    run_step(launch, step, Tensors(param, None, states, copy, beside))


def _lamb_numbers(hyper: LambHyper, ratio: float) -> tuple[float | LerpWeight, ...]:
    bias2_root = math.sqrt(1.0 - hyper.beta2**hyper.step)
    return (
        hyper.scale,
        LerpWeight.of(hyper.beta1),
        hyper.beta2,
        1.0 - hyper.beta2,
        hyper.eps * bias2_root,
        bias2_root / (1.0 - hyper.beta1**hyper.step),
        hyper.weight_decay,
        -(hyper.lr * ratio),
    )


_STEPS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "adamw": adamw,
        "lion": lion,
        "adagrad": adagrad,
        "sgd": sgd,
        "lamb_moments": lamb_moments,
        "lamb_step": lamb_step,
    }
)
KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {**_STEPS, "adamw": _adamw_in_float32, **{f"coded_{op}": kernel for op, kernel in _STEPS.items()}}
)
"""By name of the op; the first argument is the launcher."""
