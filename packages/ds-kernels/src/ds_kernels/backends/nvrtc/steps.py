"""How a step of an optimizer gets to the GPU: the kernel for its data types, and its argument."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import NOTHING, Beside, check_device, mark_written
from .kernel import FORMATS, PACKET, Kernel
from .launcher import Launcher

_THREADS = 256  # kStepThreads of cuda/step.cuh
_CODED: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.bfloat16: "Split", torch.int8: "Signed", torch.uint8: "Roots"}
)
_MAX_STATES = 2


class _Operand(ctypes.Structure):
    """``Operand`` of ``cuda/state_codecs.cuh``."""

    _fields_ = (("data", ctypes.c_void_p), ("extra", ctypes.c_void_p))


class StepArgs(ctypes.Structure):
    """``StepArgs`` of ``cuda/step.cuh`` up to the scalars, which each step adds."""

    _fields_ = (
        *((name, _Operand) for name in ("param", "grad", "first", "second", "copy")),
        ("squares", ctypes.c_void_p),
        ("numel", ctypes.c_uint64),
        ("zero_grad", ctypes.c_uint64),
    )


class LerpWeight(ctypes.Structure):
    """``LerpWeight`` of ``cuda/step_formulas.cuh``: starts from whichever end is nearer."""

    _fields_ = (("value", ctypes.c_float), ("from_end", ctypes.c_uint))

    @classmethod
    def of(cls, beta: float) -> LerpWeight:
        """Return that of ``beta`` for the old value."""
        weight = ctypes.c_float(1.0 - beta).value
        return cls(weight - 1.0, 1) if weight >= 0.5 else cls(weight, 0)


class Step(NamedTuple):
    """One of ``cuda/step_formulas.cuh``, and its argument.

    The numbers are computed in double precision and rounded once, as in the native module.
    """

    formula: str
    args: type[StepArgs]
    numbers: Sequence[float | LerpWeight]
    zero_grad: bool = False


class Tensors(NamedTuple):
    """What a step reads and writes."""

    param: Tensor
    grad: Tensor | None
    states: Mapping[str, Tensor]
    copy: Tensor | None = None
    beside: Beside = NOTHING
    squares: Tensor | None = None  # written: two sums for each chunk


def step_kernel(formula: str, args: type[StepArgs], formats: Sequence[str]) -> Kernel:
    """Return the kernel for the formats of parameter, gradient, copy, and both states."""
    scalars = args.__name__.replace("Args", "Scalars").lstrip("_")
    function = f"step<{', '.join((formula, *formats))}>"
    return Kernel("step.cuh", f"StepArgs<{scalars}>", function, _THREADS, blocks=1)


def run_step(launch: Launcher, step: Step, tensors: Tensors) -> None:
    """Do ``step`` on checked tensors.

    Raises:
        ValueError: If the parameter is not on the launcher's kind of device.
    """
    param, grad, states, copy, beside, squares = tensors
    check_device("nvrtc", launch.device_type, "param", param)
    numel = param.numel()
    if numel:
        none = [None] * (_MAX_STATES - len(states))
        scales = [beside.scales.get(name) for name in states]
        rows = ((param, beside.low), (grad, None), *zip((*states.values(), *none), (*scales, *none)), (copy, None))
        master, of_grad, first, second, of_copy = (_format(*row) for row in rows)
        kernel = step_kernel(step.formula, step.args, (master, of_grad, of_copy, first, second))
        at = None if squares is None else squares.data_ptr()
        args = step.args(*(_operand(*row) for row in rows), at, numel, step.zero_grad, *step.numbers)
        launch(kernel, param.device, (-(-numel // (PACKET * _THREADS)), 1), args)
    written = (param, beside.low, copy, grad if step.zero_grad else None)
    mark_written(*written, *states.values(), *beside.scales.values())


def _format(tensor: Tensor | None, extra: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return FORMATS[tensor.dtype] if extra is None else _CODED[tensor.dtype]


def _operand(tensor: Tensor | None, extra: Tensor | None) -> _Operand:
    return _Operand(None if tensor is None else tensor.data_ptr(), None if extra is None else extra.data_ptr())
