"""The GPU kernels of ds-kernels, compiled by a C++ compiler and run on the CPU: tested where there is no GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ds_kernels.backends.nvrtc.backend import NvrtcBackend
from ds_kernels.backends.nvrtc.kernel import HEADERS, Kernel, headers_text

HEADER = Path(__file__).with_suffix(".h")
# No contraction, as in the options of NVRTC; the fused multiply-adds are in the source.
COMPILE = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas")


class HostLauncher:
    """Takes the place of ``CudaLauncher``: same sources, same arguments, host memory."""

    device_type = "cpu"

    def unusable(self) -> str | None:
        """Say so where there is no C++ compiler."""
        return None if shutil.which("g++") else "there is no g++ to compile the GPU kernels for the CPU with"

    def __call__(self, kernel: Kernel, device: torch.device, blocks: tuple[int, int], args: ctypes.Structure) -> None:
        """Run ``kernel``, one block after the other."""
        assert min(blocks) >= 1
        assert blocks[1] <= 65535
        _compiled(kernel)(ctypes.byref(args), *blocks)


class HostBackend(NvrtcBackend):
    """The nvrtc backend on the CPU, with its kernels as methods."""

    def __init__(self) -> None:
        super().__init__(launcher=HostLauncher())

    def __getattr__(self, op: str) -> Callable[..., Any]:
        kernel = self.find(op, torch.device("cpu"), torch.float32)
        if kernel is None:
            raise AttributeError(op)
        return kernel


@functools.cache
def _compiled(kernel: Kernel) -> Callable[..., None]:
    parts = kernel.source, headers_text(), HEADER.read_text(), *COMPILE
    folder = Path(tempfile.gettempdir()) / f"ds-kernels-on-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, built = Path(work) / "kernel.cpp", Path(work) / "kernel.so"
            source.write_text(kernel.source)
            include = [f"-I{HEADERS}", f'-DDS_KERNELS_DEVICE_HEADER="{HEADER}"']
            subprocess.run(["g++", *COMPILE, *include, str(source), "-o", str(built)], check=True)
            built.replace(library)
    function: Callable[..., None] = ctypes.CDLL(str(library))[kernel.name]
    return function
