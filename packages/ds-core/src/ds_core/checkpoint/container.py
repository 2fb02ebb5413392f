"""Safetensors files: names of data types, the header, and a tensor's bytes without a copy."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable
from typing import Final, NamedTuple

import torch
from torch import Tensor

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The data types that a checkpoint holds, by their names in the safetensors format."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a safetensors file; all of ours are 1D."""

    name: str
    dtype: str
    numel: int
    nbytes: int


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of ``dtype``.

    Raises:
        ValueError: The format has no name for it.

    Example:
        >>> dtype_name(torch.bfloat16)
        'BF16'
    """
    if dtype not in _NAMES:
        raise ValueError(f"safetensors files hold {', '.join(DTYPES)}; got {dtype}: convert the tensor to one of them")
    return _NAMES[dtype]


def encode_header(entries: Iterable[Entry]) -> bytes:
    """Return the bytes that precede the data: their length, then names, types and offsets as JSON.

    Args:
        entries: In the order in which their data will follow, without gaps.

    Returns:
        A multiple of 8 bytes, so that data whose types come largest first are aligned.

    Example:
        >>> encode_header([Entry("param/w[0:2]", "F32", 2, 8)])[8:]
        b'{"__metadata__":{"format":"pt"},"param/w[0:2]":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

    Reference:
        Hugging Face, "Safetensors: format", https://github.com/huggingface/safetensors, 2022.
    """
    # transformers refuses files that do not name the framework they were written by.
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": [entry.numel],
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def byte_view(tensor: Tensor) -> memoryview:
    r"""Return the memory of a contiguous, non-empty CPU tensor; valid as long as the tensor is.

    Example:
        >>> pair = torch.tensor([1, 2], dtype=torch.int16)
        >>> bytes(byte_view(pair))
        b'\x01\x00\x02\x00'
    """
    memory = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


def require_little_endian() -> None:
    """Raise :class:`NotImplementedError` where tensors' memory is not in the byte order of the files."""
    if sys.byteorder != "little":
        raise NotImplementedError(
            f"checkpoints hold little-endian values and are written from memory as it is; "
            f"this machine is {sys.byteorder}-endian: use a little-endian one"
        )
