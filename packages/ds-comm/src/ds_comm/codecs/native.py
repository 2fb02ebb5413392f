"""Codes in C++, where the wheel was built with a compiler: the bytes of the torch operations, sooner."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .layout import Layout

_logger = logging.getLogger(__package__)


def native_codes(device: torch.device) -> ModuleType | None:
    """Return the native module for tensors on ``device``; None where there is none."""
    return _load() if device.type == "cpu" else None


@cache
def _load() -> ModuleType | None:
    """Return the native module; None where it was not built or, which is warned of, cannot be loaded."""
    package = __package__.rpartition(".")[0]
    try:
        return importlib.import_module("._codes", package)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == f"{package}._codes"):
            _logger.warning(
                "the native codes %s._codes are there and do not load (%s): torch operations compute the same bytes, "
                "more slowly; reinstall ds-comm where it runs",
                package,
                error,
            )
        return None


class NativeBlocks:
    """Block codes of float32 in host memory, each in one pass; its methods are kernels of the role ``KernelBackend``.

    Args:
        module: The native one.
        best: With the instructions of this processor; else with those that all of its family have: the same bytes.
    """

    def __init__(self, module: ModuleType, *, best: bool = True) -> None:
        self._module = module
        self._best = best

    def find(self, op: str, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op``; None where data of ``dtype`` has none."""
        kernels: dict[str, Callable[..., Any]] = {
            "block_encode": self.block_encode,
            "block_decode": self.block_decode,
            "block_accumulate": self.block_accumulate,
        }
        return kernels[op] if dtype == torch.float32 else None

    def block_encode(self, x: Tensor, error: Tensor | None, payload: Tensor, layout: Layout) -> None:
        """Code ``x`` plus ``error``, which then is what was lost."""
        owed = 0 if error is None else error.data_ptr()
        self._module.block_encode(self._best, x.data_ptr(), owed, payload.data_ptr(), *_numbers(x, layout))
        torch.autograd.graph.increment_version([payload] if error is None else [payload, error])

    def block_decode(self, out: Tensor, payload: Tensor, layout: Layout) -> None:
        """Write what ``payload`` stands for."""
        self._module.block_decode(self._best, out.data_ptr(), payload.data_ptr(), *_numbers(out, layout))
        torch.autograd.graph.increment_version(out)

    def block_accumulate(self, out: Tensor, payload: Tensor, layout: Layout, scale: float) -> None:
        """Add ``scale`` times what ``payload`` stands for."""
        self._module.block_accumulate(self._best, out.data_ptr(), payload.data_ptr(), *_numbers(out, layout), scale)
        torch.autograd.graph.increment_version(out)


def _numbers(tensor: Tensor, layout: Layout) -> tuple[int, int, str, bool]:
    return tensor.numel(), layout.block, layout.code, layout.scale_dtype == torch.float16
