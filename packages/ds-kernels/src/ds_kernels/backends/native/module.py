"""The native module, loaded at the first use."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..._native import Kernels

FORMATS = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
"""How the native module numbers data types."""


def unusable(isa: str | None) -> str | None:
    """Return why the native kernels cannot run here, in one line; None when they can."""
    try:
        _load(isa)
    except ImportError as error:
        return _missing(error)
    except ValueError as error:  # the processor lacks the instruction set
        return str(error)
    return None


@functools.cache
def native(isa: str | None) -> Kernels:
    """Return the kernels of one instruction set; None takes the fastest the processor runs.

    Raises:
        RuntimeError: If the native module is missing.
    """
    try:
        return _load(isa)
    except ImportError as error:
        raise RuntimeError(f"{_missing(error)}; or choose the backend 'reference'") from error


def _load(isa: str | None) -> Kernels:
    # Imported here, not above: a process that never steps on a CPU should not map the library. By now torch
    # has been imported, so the library binds to torch's OpenMP runtime and not to a second one.
    from ... import _native

    return _native.Kernels(isa or _native.isas()[0])


def _missing(error: ImportError) -> str:
    return f"the native module is missing or broken ({error}); reinstall where a C++17 compiler is found"
