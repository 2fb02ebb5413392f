"""The triton backend: what the registry sees of the Triton kernels."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

_FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        op: module
        for module, ops in {
            ".activations": ("bias_gelu", "bias_swiglu"),
            ".norms": ("layer_norm", "rms_norm"),
        }.items()
        for name in ops
        for op in (name, f"{name}_backward")
    }
)
"""Module of each op."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonBackend:
    """Activations and norms in Triton, on NVIDIA and AMD GPUs.

    Not steps and sums: Triton leaves open where multiplications and additions are contracted, so bits would be the
    compiler's choice.

    Example:
        >>> TritonBackend().find("adamw", torch.device("cuda"), torch.float32) is None
        True
    """

    device_type: str = "cuda"
    """Type of the devices that tensors are on; ``cpu`` for Triton's interpreter, in tests."""

    @property
    def name(self) -> str:
        """``triton``."""
        return "triton"

    def unusable(self) -> str | None:
        """Return why the kernels cannot run here, in one line; None when they can."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is missing; pip install triton"
        if self.device_type == "cuda" and torch.cuda.device_count() == 0:
            return "torch finds no GPU"
        return None

    def find(self, op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op`` for tensors in a GPU's memory; None where there is none."""
        if device.type != self.device_type or dtype not in _FLOATS or op not in _FAMILIES:
            return None
        # Imported here: Triton is optional, and takes a second.
        kernel: Callable[..., Any] = getattr(importlib.import_module(_FAMILIES[op], __package__), op)
        return kernel
