"""Builds the native kernels where a C++ compiler is found; without one the wheel installs all the same."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

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

setup(
    ext_modules=[
        Pybind11Extension(
            "ds_kernels._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=COMPILE,
            extra_link_args=["-fopenmp", "-Wl,--strip-all"],
            optional=True,
        )
    ]
)
