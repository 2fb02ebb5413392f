"""One safetensors file, written tensor by tensor, that gets its name when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .checkpoint.container import byte_view, dtype_name, require_little_endian

_SUFFIX = ".safetensors"


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize


class WeightFile:
    """Writes tensors one after the other, within ``with``: however that is left, an unfinished file is removed.

    Args:
        folder: Created where it does not exist.
        name: Of the file.
        tensors: In the order in which they will come.
        aliases: Further names of tensors, with the name each is stored under.

    Raises:
        ValueError: The name does not end with ``.safetensors``, or the format has no name for a data type.

    Example:
        >>> import tempfile
        >>> planned = Planned("w", torch.float32, torch.Size([2]))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     with WeightFile(Path(path), "a.safetensors", [planned], {}) as file:
        ...         file.begin()
        ...         file.write(torch.ones(2))
        ...         file.finish()
        ...     [each.name for each in Path(path).iterdir()]
        ['a.safetensors']
    """

    def __init__(self, folder: Path, name: str, tensors: Sequence[Planned], aliases: Mapping[str, str]) -> None:
        if not name.endswith(_SUFFIX) or Path(name).name != name:
            raise ValueError(
                f"weights are written in the safetensors format, never pickled, to one file within {folder}: give a "
                f"file name that ends with {_SUFFIX}, got {name!r}"
            )
        require_little_endian()
        self._path = folder / name
        self._draft = folder / f".{name}.tmp"
        self._tensors = iter(tensors)
        self._header = _header(tensors, aliases)
        self._file: BinaryIO | None = None  # the draft, once begun

    def __enter__(self) -> WeightFile:
        """Return itself; nothing is there before :meth:`begin`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was begun and not finished."""
        if self._file is not None:
            with suppress(OSError):  # a full disk, once more: nobody needs what is not written yet
                self._file.close()
            self._draft.unlink(missing_ok=True)

    def begin(self) -> None:
        """Make the folder, and make sure that nothing would be overwritten."""
        if self._path.exists():
            raise ValueError(f"{self._path} exists already: give another folder or name, or remove it")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._draft.open("wb")
        self._file.write(self._header)

    def write(self, values: Tensor) -> None:
        """Write the next tensor, converted to its planned data type."""
        stored = values.to("cpu", next(self._tensors).dtype).contiguous()  # it outlives the view of its bytes
        if stored.numel():
            self._begun().write(byte_view(stored))

    def finish(self) -> None:
        """Give the file its name."""
        file = self._begun()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._draft.rename(self._path)
        self._file = None

    def _begun(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError(f"{self._path} is not begun, or finished: call begin() first, and finish() last")
        return self._file


def _header(tensors: Sequence[Planned], aliases: Mapping[str, str]) -> bytes:
    """Return what precedes the data of ``tensors``, which follow each other without gaps."""
    # transformers refuses files that do not name the framework they were written by
    table: dict[str, object] = {"__metadata__": {"format": "pt", **aliases}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        table[tensor.name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
