"""The nvrtc backend: what the registry sees of the GPU kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import activations, codecs, dropout, norms, optimizers, reductions, softmax
from .kernel import FORMATS
from .launcher import Launcher, cuda_launcher


@dataclass(frozen=True, kw_only=True, slots=True)
class NvrtcBackend:
    """Kernels in CUDA C++ for NVIDIA GPUs, from compute capability 8.0 on.

    Steps and sums have the bits of the cpu backend; see [Note: Same bits] in ``cpu.py``. Each kernel is compiled at
    its first use, for the GPU at hand, in about half a second; see docs/kernels.md for where it is kept.

    Example:
        >>> NvrtcBackend().find("adamw", torch.device("cpu"), torch.float32) is None
        True
    """

    launcher: Launcher = field(default_factory=cuda_launcher)
    """Where kernels run."""

    @property
    def name(self) -> str:
        """``nvrtc``."""
        return "nvrtc"

    def unusable(self) -> str | None:
        """Return why the kernels cannot run here, in one line; None when they can."""
        return self.launcher.unusable()

    def find(self, op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op`` for tensors in a GPU's memory; None where there is none."""
        if device.type != self.launcher.device_type or dtype not in FORMATS:
            return None
        for family in (optimizers, reductions, activations, norms, dropout, softmax, codecs):
            if (kernel := family.KERNELS.get(op)) is not None:
                return functools.partial(kernel, self.launcher)
        return None
