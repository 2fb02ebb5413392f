"""Steps of optimizers by the native kernels: one pass over memory, whatever the codecs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..checks import NOTHING, Beside, check_cpu, check_step, mark_written
from ..plain.optimizers import check_momentum

if TYPE_CHECKING:
    from ds_core.kernel_protocols import AdamHyper

    from ..._native import Kernels
    from ...hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper

CODECS = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 4, torch.uint8: 5})
"""How the native module numbers codecs."""

_SPLIT = 3
_STOCHASTIC = 6
_Operand: TypeAlias = tuple[int, int, int]  # data, extra, codec
_Arrays: TypeAlias = tuple[_Operand, _Operand, list[_Operand], _Operand, bool, int, int]
_NONE: _Operand = (0, 0, 0)


def adamw(
    kernels: Kernels,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None = None,
    hyper: AdamHyper,
    beside: Beside = NOTHING,
) -> None:
    """See :meth:`CpuBackend.adamw`."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, grad, states, copy, beside)
    # Without decay both forms are the same, and the decoupled one leaves every bit of the gradient.
    decoupled = hyper.decoupled or hyper.weight_decay == 0
    betas = hyper.beta1, hyper.beta2
    kernels.adam(
        _arrays(param, grad, states, copy, beside, zero_grad=hyper.zero_grad),
        (hyper.step, hyper.lr, *betas, hyper.eps, hyper.weight_decay, hyper.scale, decoupled),
    )
    _mark(param, states, beside, copy, grad if hyper.zero_grad else None)


def lion(
    kernels: Kernels,
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
    kernels.lion(
        _arrays(param, grad, states, copy, beside, zero_grad=hyper.zero_grad),
        (hyper.lr, hyper.beta1, hyper.beta2, hyper.weight_decay, hyper.scale),
    )
    _mark(param, states, beside, copy, grad if hyper.zero_grad else None)


def adagrad(
    kernels: Kernels,
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
    kernels.adagrad(
        _arrays(param, grad, states, copy, beside, zero_grad=hyper.zero_grad),
        (hyper.step, hyper.lr, hyper.lr_decay, hyper.eps, hyper.weight_decay, hyper.scale),
    )
    _mark(param, states, beside, copy, grad if hyper.zero_grad else None)


def sgd(
    kernels: Kernels,
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
    numbers = (hyper.lr, hyper.momentum, hyper.dampening, hyper.weight_decay)
    kernels.sgd(
        _arrays(param, grad, states, copy, beside, zero_grad=hyper.zero_grad),
        (*numbers, hyper.nesterov, hyper.first, hyper.scale),
    )
    _mark(param, states, beside, copy, grad if hyper.zero_grad else None)


def lamb_moments(
    kernels: Kernels,
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
    squares = kernels.lamb_moments(
        _arrays(param, grad, states, None, beside, zero_grad=hyper.zero_grad), _lamb_numbers(hyper, 1.0)
    )
    _mark(None, states, beside, None, grad if hyper.zero_grad else None)
    return torch.tensor(squares, dtype=torch.float64)


def lamb_step(
    kernels: Kernels,
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
    kernels.lamb_step(_arrays(param, None, states, copy, beside, zero_grad=False), _lamb_numbers(hyper, ratio))
    _mark(param, {}, beside, copy, None)


def _lamb_numbers(hyper: LambHyper, ratio: float) -> tuple[int, float, float, float, float, float, float]:
    betas = hyper.beta1, hyper.beta2
    return (hyper.step, hyper.lr * ratio, *betas, hyper.eps, hyper.weight_decay, hyper.scale)


def _arrays(
    param: Tensor,
    grad: Tensor | None,
    states: Mapping[str, Tensor],
    copy: Tensor | None,
    beside: Beside,
    *,
    zero_grad: bool,
) -> _Arrays:
    check_cpu("param", param)
    return (
        _stored("param", param, beside) if beside.low is None else (param.data_ptr(), beside.low.data_ptr(), _SPLIT),
        _NONE if grad is None else _operand(grad),
        [_stored(name, state, beside) for name, state in states.items()],
        _NONE if copy is None else _operand(copy),
        zero_grad,
        param.numel(),
        torch.get_num_threads(),
    )


def _stored(name: str, tensor: Tensor, beside: Beside) -> _Operand:
    if name in beside.keys:
        return tensor.data_ptr(), beside.keys[name].data_ptr(), _STOCHASTIC
    return _operand(tensor, beside.scales.get(name))


def _operand(tensor: Tensor, extra: Tensor | None = None) -> _Operand:
    return tensor.data_ptr(), 0 if extra is None else extra.data_ptr(), CODECS[tensor.dtype]


def _mark(
    param: Tensor | None, states: Mapping[str, Tensor], beside: Beside, copy: Tensor | None, grad: Tensor | None
) -> None:
    mark_written(param, beside.low, copy, grad, *states.values(), *beside.scales.values())


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
    {f"{kind}{op}": kernel for kind in ("", "coded_", "rounded_") for op, kernel in _STEPS.items()}
)
"""By name of the op; the first argument is the kernels of an instruction set."""
