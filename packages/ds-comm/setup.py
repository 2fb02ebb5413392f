"""Builds the shared-memory transport where a C++ compiler is found; without one the wheel installs all the same."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

COMPILE = [
    "-O3",
    # Bits must not depend on the compiler's taste.
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-trapping-math",
    "-g0",
]

setup(
    ext_modules=[
        Pybind11Extension(
            "ds_comm._shm",
            sources=sorted(str(path) for path in Path("csrc/shm").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc/shm").glob("*.h")),
            cxx_std=17,
            extra_compile_args=COMPILE,
            extra_link_args=["-Wl,--strip-all"],
            optional=True,
        )
    ]
)
