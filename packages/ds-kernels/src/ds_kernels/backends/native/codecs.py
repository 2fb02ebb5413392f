"""Block codes of the cpu backend: one pass over memory. See [Note: Payload]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import mark_written
from ..payload import Layout, check_decode, check_encode
from .module import FORMATS

if TYPE_CHECKING:
    from ..._native import Kernels

_CODES: Mapping[str, int] = MappingProxyType({"sign": 0, "ternary": 1, "int4": 2, "int8": 3})


def block_encode(kernels: Kernels, x: Tensor, error: Tensor | None, payload: Tensor, layout: Layout) -> None:
    """Code ``x + error`` into ``payload``; ``error`` becomes what the payload lacks. Meaning as in plain torch."""
    check_encode(x, error, payload, layout)
    kernels.block_encode(
        x.data_ptr(),
        0 if error is None else error.data_ptr(),
        payload.data_ptr(),
        x.numel(),
        FORMATS[x.dtype],
        _numbers(layout),
        torch.get_num_threads(),
    )
    mark_written(payload, error)


def block_decode(kernels: Kernels, out: Tensor, payload: Tensor, layout: Layout) -> None:
    """Write what ``payload`` stands for into ``out``. Meaning as in plain torch."""
    check_decode(out, payload, layout)
    formats = FORMATS[out.dtype], _numbers(layout)
    kernels.block_decode(out.data_ptr(), payload.data_ptr(), out.numel(), *formats, torch.get_num_threads())
    mark_written(out)


def block_accumulate(kernels: Kernels, out: Tensor, payload: Tensor, layout: Layout, weight: float) -> None:
    """Add ``weight`` times what ``payload`` stands for to ``out``. Meaning as in plain torch."""
    check_decode(out, payload, layout, (torch.float32,))
    numbers, threads = _numbers(layout), torch.get_num_threads()
    kernels.block_accumulate(out.data_ptr(), payload.data_ptr(), out.numel(), numbers, weight, threads)
    mark_written(out)


def _numbers(layout: Layout) -> tuple[int, int, int]:
    return _CODES[layout.code], layout.block, FORMATS[layout.scale_dtype]


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"block_encode": block_encode, "block_decode": block_decode, "block_accumulate": block_accumulate}
)
"""By name of the op; the first argument is the native module's kernels."""
