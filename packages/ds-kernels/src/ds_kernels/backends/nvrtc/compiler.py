"""From a kernel's source to machine code of one GPU architecture, with NVRTC through cuda.core."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from .kernel import HEADERS, Kernel, headers_text

OPTIONS = (("std", "c++17"), ("fma", False), ("ftz", False), ("prec_div", True), ("prec_sqrt", True))
"""Of every kernel: nothing is contracted, flushed or approximated, so bits are the source's choice."""

WHEELS: Mapping[str, str] = MappingProxyType(
    {
        "nvrtc": "nvidia-cuda-nvrtc",
        "cudart": "nvidia-cuda-runtime",
        "cccl": "nvidia-cuda-cccl",
        "cutlass": "nvidia-cutlass",
    }
)
"""Distributions whose releases decide machine code."""

INSTALL = "pip install 'ds-kernels[cuda]'"
"""What brings cuda.core and NVRTC."""


def compile_cubin(kernel: Kernel, arch: str) -> bytes:
    """Compile ``kernel``; needs no GPU, and from cuda.core 1.0 on no driver. Half a second of processor time.

    Uses ``Program``, ``ProgramOptions`` and ``ObjectCode.code`` of cuda.core; releases before 1.0 have them under
    ``cuda.core.experimental``.

    Args:
        kernel: What to compile.
        arch: Such as ``sm_90``.

    Returns:
        A cubin: an ELF file that the driver loads.

    Raises:
        RuntimeError: If cuda.core or NVRTC is missing, or the source does not compile.
    """
    core = _cuda_core()
    includes = [str(HEADERS), *map(_headers_of, kernel.libraries)]
    # CUTLASS leaves many functions without __device__ that its kernels call.
    unmarked = {"device_as_default_execution_space": True} if kernel.libraries else {}
    options = core.ProgramOptions(arch=arch, include_path=includes, **dict(OPTIONS), **unmarked)
    try:
        return bytes(core.Program(kernel.source, "c++", options).compile("cubin").code)
    except Exception as error:  # its classes moved between releases of cuda.core
        raise RuntimeError(
            f"NVRTC cannot compile {kernel.name} for {arch}: {type(error).__name__}: {error}; choose the backend "
            "'reference', or install the NVRTC of a CUDA release that knows this GPU"
        ) from error


def cache_key(kernel: Kernel, arch: str) -> str:
    """Return what a compiled kernel is kept under: a digest of all that decides its machine code."""
    releases = (_release(WHEELS[library]) for library in ("nvrtc", *kernel.libraries))
    parts = (kernel.source, headers_text(), arch, str(OPTIONS), *releases)
    return f"{kernel.name}-{arch}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def _release(wheel: str) -> str:
    # Not asked of the library itself: loading it takes longer than loading a compiled kernel.
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return f"beside torch for CUDA {torch.version.cuda}"


def _headers_of(library: str) -> str:
    from cuda import pathfinder  # it comes with cuda.core

    folder = pathfinder.find_nvidia_header_directory(library)
    if folder is None:
        raise RuntimeError(f"the headers of {library} are missing; pip install 'ds-kernels[cutlass]'")
    return str(folder)


def _cuda_core() -> Any:
    # Imported here: a process whose kernels are all on disk needs no compiler.
    try:
        from cuda import core
    except ImportError as error:
        raise RuntimeError(f"cuda.core is missing ({error}); {INSTALL}") from error
    if "Program" in dir(core):
        return core
    from cuda.core import experimental

    return experimental
