"""Builds the native kernels where a C++ compiler is found; without one the wheel installs all the same.

With ``DS_KERNELS_BUILD_HOPPER=1`` also the module ``_hopper``, by nvcc and with CUTLASS's headers; then a failure is an
error.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup

COMPILE = [
    "-O3",
    # Bits must not depend on the compiler's taste: fused multiply-adds stand in the source.
    "-ffp-contract=off",
    "-fno-fast-math",
    # Nobody reads errno or floating-point traps; without these, loops with sqrt or a choice stay scalar.
    "-fno-math-errno",
    "-fno-trapping-math",
    # Links libgomp by its plain name, so that the process shares the one torch has loaded.
    "-fopenmp",
    "-g0",
]

NVCC = [
    "-std=c++17",
    "-O2",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    # An assertion is a function call, in front of which ptxas waits for the tensor cores.
    "-DNDEBUG",
    "--threads=0",
    "-shared",
    # No library of CUDA's is needed at run time but the driver, which is asked for at the first launch.
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xlinker=--strip-all",
]

HOPPER = "ds_kernels._hopper"


class BuildWithNvcc(build_ext):
    """Builds the module for Hopper by nvcc, all others as usual."""

    def build_extension(self, ext: Extension) -> None:
        """Build one module."""
        if ext.name != HOPPER:
            super().build_extension(ext)
            return
        nvcc, cutlass = shutil.which("nvcc"), importlib.util.find_spec("cutlass_library")
        if nvcc is None or cutlass is None:
            missing = "nvcc" if nvcc is None else "CUTLASS (pip install nvidia-cutlass==4.2.0.0)"
            raise RuntimeError(f"DS_KERNELS_BUILD_HOPPER=1 needs nvcc and CUTLASS's headers; there is no {missing}")
        source = Path(cutlass.origin).parent / "source"
        folders = source / "include", source / "tools/util/include", pybind11.get_include(), *self.include_dirs
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in folders]
        subprocess.run([nvcc, *NVCC, *includes, *ext.sources, "-o", str(target)], check=True)


def sources(folder: str, pattern: str) -> list[str]:
    """Return the files of ``folder``."""
    return sorted(str(path) for path in Path(folder).glob(pattern))


modules = [
    Pybind11Extension(
        "ds_kernels._native",
        sources=sources("csrc", "*.cpp"),
        depends=sources("csrc", "*.h"),
        cxx_std=17,
        extra_compile_args=COMPILE,
        extra_link_args=["-fopenmp", "-Wl,--strip-all"],
        optional=True,
    )
]
if os.environ.get("DS_KERNELS_BUILD_HOPPER") == "1":
    modules.append(Extension(HOPPER, [*sources("csrc/hopper", "*.cu"), *sources("csrc/hopper", "*.cpp")]))

setup(ext_modules=modules, cmdclass={"build_ext": BuildWithNvcc})
