"""Codes in C++, where the wheel was built with a compiler: the bytes of the torch operations, sooner."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch


@cache
def native_codes(device: torch.device) -> ModuleType | None:
    """Return the native module for tensors on ``device``; None where there is none."""
    if device.type != "cpu":
        return None
    try:
        return importlib.import_module("._codes", __package__.rpartition(".")[0])
    except ImportError:
        return None
