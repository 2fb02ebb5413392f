"""A kernel as a piece of source: which function template, with which types, behind which name."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

HEADERS = Path(__file__).parent / "cuda"
"""Folder of the CUDA C++ sources."""

FORMATS: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
)
"""How the sources call data types; see ``cuda/formats.cuh``."""

PACKET = 4
"""Elements a thread reads at a time: ``kPacket`` of ``cuda/packet.cuh``."""


class Kernel(NamedTuple):
    """An instance of a function template; its one argument is a struct, passed by value.

    Example:
        >>> Kernel("tree_sum.cuh", "TreeSumArgs", "tree_sum<Float32, Float32>", 256).name
        'tree_sum_Float32_Float32'
    """

    header: str
    """File of :data:`HEADERS` that defines the function."""
    struct: str
    """Type of the argument."""
    function: str
    """The function with its template arguments."""
    threads: int
    """Of a block."""
    shared: int = 0
    """Bytes of shared memory that the launch sets aside, besides what the source declares."""
    libraries: tuple[str, ...] = ()
    """Of whose headers it is made, as cuda.pathfinder names them."""
    blocks: int | None = None
    """That a multiprocessor must have room for. None: the compiler weighs, and may spill to make room for one more."""

    @property
    def name(self) -> str:
        """Name of the entry point."""
        return re.sub(r"\W+", "_", self.function).strip("_")

    @property
    def source(self) -> str:
        """The translation unit."""
        bounds = f"({self.threads})" if self.blocks is None else f"({self.threads}, {self.blocks})"
        entry = f"DS_KERNELS_ENTRY({self.name}, {bounds}, {self.struct}, {self.function})"
        return f'#include "{self.header}"\nusing namespace ds_kernels;\n{entry}\n'


@functools.cache
def headers_text() -> str:
    """Return all headers, one after the other: what a compiled kernel depends on besides its own source."""
    return "".join(f"// {path.name}\n{path.read_text()}" for path in sorted(HEADERS.glob("*.cuh")))
