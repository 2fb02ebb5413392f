"""Runs kernels: compiled once for a machine, loaded once for a process, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any, Protocol

import torch

from ..._env import cache_folder
from .cache import KernelCache
from .compiler import INSTALL, cache_key, compile_cubin
from .driver import driver, missing_driver
from .kernel import Kernel


class Launcher(Protocol):
    """Where kernels run."""

    @property
    def device_type(self) -> str:
        """Type of the devices whose memory kernels reach."""

    def unusable(self) -> str | None:
        """Why nothing can run here, in one line; None when it can."""

    def __call__(self, kernel: Kernel, device: torch.device, blocks: tuple[int, int], args: ctypes.Structure) -> None:
        """Run ``kernel`` after all that was asked of ``device`` before."""


class CudaLauncher:
    """Runs kernels on NVIDIA GPUs.

    The first launch of a kernel in a process loads it from the cache, or compiles it. That must not fall into the
    capture of a CUDA graph: run once before.

    Args:
        cache: Where compiled kernels are kept.
    """

    def __init__(self, cache: KernelCache) -> None:
        self._cache = cache
        self._handles: dict[tuple[Kernel, int], Any] = {}  # by index of the device

    @property
    def device_type(self) -> str:
        """``cuda``."""
        return "cuda"

    def unusable(self) -> str | None:
        """Return why kernels cannot run here, in one line; None when they can. Does not start CUDA."""
        if getattr(torch.version, "hip", None) is not None:
            return "torch is built for ROCm, the kernels for NVIDIA GPUs"
        if (reason := missing_driver()) is not None:
            return reason
        if torch.cuda.device_count() == 0:
            return "torch finds no NVIDIA GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        if not _installed("cuda.core"):
            return f"cuda.core, which compiles the kernels, is missing; {INSTALL}"
        return None

    def __call__(self, kernel: Kernel, device: torch.device, blocks: tuple[int, int], args: ctypes.Structure) -> None:
        """Enqueue ``kernel`` on the current stream of ``device``.

        Args:
            kernel: What to run.
            device: With an index.
            blocks: In x and in y, each at least 1.
            args: Its argument; the memory it points to must stay as it is until the stream has passed.

        Raises:
            RuntimeError: If it cannot be compiled, loaded or launched.
        """
        index = device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        handle = self._handles.get((kernel, index))
        if handle is None:
            handle = self._handles[kernel, index] = self._load(kernel, index)
        driver().launch(handle, index, stream, (*blocks, kernel.threads, kernel.shared), args)

    def _load(self, kernel: Kernel, index: int) -> Any:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
        cubin = self._cache.get(cache_key(kernel, arch), lambda: compile_cubin(kernel, arch))
        return driver().load(cubin, kernel.name, index, kernel.shared)


@functools.cache
def cuda_launcher() -> CudaLauncher:
    """Return the launcher of this process: what it has loaded serves all backends made here."""
    return CudaLauncher(KernelCache(cache_folder()))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False
