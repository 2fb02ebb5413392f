"""The cutlass backend: what the registry sees of the kernels made from CUTLASS."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ..nvrtc.launcher import Launcher, cuda_launcher
from .hopper import Hopper, built_hopper
from .linear import ELEMENTS, linear_dgelu, linear_gelu

_KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"linear_gelu": linear_gelu, "linear_dgelu": linear_dgelu}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CutlassBackend:
    """Matrix products in bfloat16 and float16 with what follows them, from compute capability 8.0 on.

    Runs only where it is chosen by name, because torch's own products come tuned for each GPU. The first use of a
    kernel compiles for some 5 seconds of processor time.

    Example:
        >>> CutlassBackend().find("linear_gelu", torch.device("cuda"), torch.float32) is None
        True
    """

    launcher: Launcher = field(default_factory=cuda_launcher)
    """Where kernels run."""
    hopper: Hopper | None = field(default_factory=built_hopper)
    """The kernels for compute capability 9.0, where they were built."""

    @property
    def name(self) -> str:
        """``cutlass``."""
        return "cutlass"

    def unusable(self) -> str | None:
        """Return why the kernels cannot run here, in one line; None when they can."""
        if (reason := self.launcher.unusable()) is not None:
            return reason
        if importlib.util.find_spec("cutlass_library") is None:
            return "the headers of CUTLASS are missing; pip install 'ds-kernels[cutlass]'"
        return None

    def find(self, op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op`` for tensors in a GPU's memory; None where there is none."""
        kernel = _KERNELS.get(op)
        if kernel is None or device.type != self.launcher.device_type or dtype not in ELEMENTS:
            return None
        return functools.partial(kernel, self.launcher, self.hopper)
