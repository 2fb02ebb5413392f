"""Builds the shared-memory transport and native codes where a C++ compiler is found; it installs without one, too."""

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


def native(name: str, folder: str) -> Pybind11Extension:
    """Return the module of the sources in a folder."""
    return Pybind11Extension(
        f"ds_comm.{name}",
        sources=sorted(str(path) for path in Path(folder).glob("*.cpp")),
        depends=sorted(str(path) for path in Path(folder).glob("*.h")),
        cxx_std=17,
        extra_compile_args=COMPILE,
        extra_link_args=["-Wl,--strip-all"],
        optional=True,
    )


setup(ext_modules=[native("_shm", "csrc/shm"), native("_codes", "csrc/codes")])
