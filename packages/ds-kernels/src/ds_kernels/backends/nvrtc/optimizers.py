"""Optimizer steps on the GPU: one launch for each tensor, one pass over memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_adam, check_device, mark_written
from .kernel import FORMATS, PACKET, Kernel
from .launcher import Launcher

if TYPE_CHECKING:
    from ds_core.kernel_protocols import AdamHyper

_THREADS = 256


class _AdamArgs(ctypes.Structure):
    """``AdamArgs`` of ``cuda/adamw.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "copy")),
        ("numel", ctypes.c_uint64),
        ("scale", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("grad_weight", ctypes.c_float),
        ("from_grad", ctypes.c_uint),
        *((name, ctypes.c_float) for name in ("beta2", "one_minus_beta2", "eps", "minus_step_size")),
    )


def adamw_kernel(grad: torch.dtype, copy: torch.dtype | None, *, decoupled: bool) -> Kernel:
    """Return the step for one combination of data types."""
    types = FORMATS[grad], FORMATS[torch.float32 if copy is None else copy], str(decoupled).lower()
    return Kernel("adamw.cuh", "AdamArgs", f"adamw<{', '.join(types)}>", _THREADS)


def adamw(
    launch: Launcher,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    copy: Tensor | None,
    hyper: AdamHyper,
) -> None:
    """Do one Adam or AdamW step, in place; the bits are those of the cpu backend. See :class:`CpuBackend`."""
    check_adam(param, grad, exp_avg, exp_avg_sq, copy)
    check_device("nvrtc", launch.device_type, "param", param)
    numel = param.numel()
    if numel == 0:
        return
    decoupled = hyper.decoupled or hyper.weight_decay == 0
    kernel = adamw_kernel(grad.dtype, None if copy is None else copy.dtype, decoupled=decoupled)
    pointers = (tensor.data_ptr() for tensor in (param, grad, exp_avg, exp_avg_sq))
    args = _AdamArgs(*pointers, None if copy is None else copy.data_ptr(), numel, *_scalars(hyper, decoupled=decoupled))
    launch(kernel, param.device, (-(-numel // (PACKET * _THREADS)), 1), args)
    mark_written(param, exp_avg, exp_avg_sq, copy)
    if hyper.zero_grad:
        grad.zero_()


def _scalars(hyper: AdamHyper, *, decoupled: bool) -> tuple[float | int, ...]:
    """Return the numbers of ``AdamScalars``: computed in double precision, rounded once, as in the native module."""
    weight = ctypes.c_float(1.0 - hyper.beta1).value
    from_grad = weight >= 0.5
    bias2_root = math.sqrt(1.0 - hyper.beta2**hyper.step)
    return (
        hyper.scale,
        1.0 - hyper.lr * hyper.weight_decay if decoupled else hyper.weight_decay,
        weight - 1.0 if from_grad else weight,
        0xFFFFFFFF if from_grad else 0,
        hyper.beta2,
        1.0 - hyper.beta2,
        hyper.eps * bias2_root,
        -(hyper.lr / (1.0 - hyper.beta1**hyper.step)) * bias2_root,
    )


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType({"adamw": adamw})
"""By name of the op; the first argument is the launcher."""
