"""Safetensors files: headers, byte ranges read into tensors, tensors written one at a time.

[Note: Reading ranges]
A safetensors file is a length, a JSON header, and the tensors as they lie in memory. What a rank needs of a tensor is a
flat interval, which is one range of bytes; it is read into a small buffer and converted from there. The ``safetensors``
library reads slices along dimensions, so it would read whole rows, and make each a tensor first; a memory-mapped file
counts as resident memory while it is read. So the format is read here, with nothing but the standard library.

Reference: Hugging Face, "Safetensors: format", https://github.com/huggingface/safetensors, 2022.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .memory import byte_view
from .texts import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
"""Data types by their names in the format."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER = 100 << 20  # the library's own limit
_BUFFER_BYTES = 4 << 20


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    position: int  # of its first byte in the file


class TensorFiles:
    """The tensors of one or several files; a context manager, which closes them.

    Args:
        path: A ``.safetensors`` file; a Hugging Face index (``.json``); or a folder that holds one of the two.

    Raises:
        ValueError: There is no such file, or it is not in the format, or cut off; or index and files disagree.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.stored: dict[str, Stored] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()
        self._buffer = bytearray(_BUFFER_BYTES)
        weight_map = _weight_map(Path(path))
        for file in sorted(set(weight_map.values())) if weight_map else [_single(Path(path))]:
            self.stored |= _read_header(file)
        if weight_map:
            wrong = [
                name for name, file in weight_map.items() if name not in self.stored or self.stored[name].path != file
            ]
            if wrong:
                raise ValueError(f"{path}: the index names tensors that its files do not hold: {', '.join(wrong[:8])}")
            self.stored = {name: self.stored[name] for name in weight_map}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1D) with elements ``start ...`` of a tensor, converted to its data type.

        Reads the bytes of these elements only, and holds at most 4 MiB of them.
        """
        stored = self.stored[name]
        file = self._file(stored.path)
        file.seek(stored.position + start * stored.dtype.itemsize)
        per_read = _BUFFER_BYTES // stored.dtype.itemsize
        for part in out.split(per_read):
            window = memoryview(self._buffer)[: part.numel() * stored.dtype.itemsize]
            if file.readinto(window) != len(window):  # type: ignore[attr-defined]  # of a buffered binary file
                raise ValueError(f"{stored.path}: the file ends within tensor {name!r}")
            part.copy_(torch.frombuffer(window, dtype=stored.dtype))

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("rb"))
        return self._open[path]


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize


def split(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    """Divide tensors among files of at most ``max_bytes`` of data each, in order; a larger tensor has its own.

    Example:
        >>> rows = [Planned(name, torch.int8, torch.Size([4])) for name in "abc"]
        >>> [[row.name for row in file] for file in split(rows, 8)]
        [['a', 'b'], ['c']]
    """
    files: list[list[Planned]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(other.nbytes for other in files[-1]) + tensor.nbytes > max_bytes:
            files.append([])
        files[-1].append(tensor)
    return files


def file_names(count: int, single: str = SINGLE) -> list[str]:
    """Return the names Hugging Face gives to so many files; one alone is called ``single``."""
    if count == 1:
        return [single]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Return what precedes the data of ``tensors``, which follow each other without gaps."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # transformers refuses files that do not name the framework they were written by
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        table[tensor.name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes tensors one after the other into one file or several; what fails in writing is returned, not raised.

    Args:
        folder: Where to.
        files: What goes into each file, in the order in which it will come.
        tied: Further names of tensors, with the name each is stored under.
        single: Name of the file if it is but one.

    Raises:
        ValueError: The format has no name for a data type.
    """

    def __init__(
        self, folder: Path, files: Sequence[Sequence[Planned]], tied: Mapping[str, str], single: str = SINGLE
    ) -> None:
        _check_dtypes(tensor for tensors in files for tensor in tensors)
        self.names = file_names(len(files), single)
        # who loads a folder looks for the standard names, of which only one kind may stand there
        self._reserved = {*self.names, *((INDEX, SINGLE) if single == SINGLE else ())}
        self._folder = folder
        self._files = [list(tensors) for tensors in files]
        self._tied = dict(tied)
        self._turns = ((number, tensor) for number, tensors in enumerate(files) for tensor in tensors)
        self._open: BinaryIO | None = None
        self._number = -1  # of the file that is open
        self._renamed: list[Path] = []

    def begin(self) -> Exception | None:
        """Make the folder, and make sure that nothing would be overwritten."""
        try:
            there = sorted(name for name in self._reserved if (self._folder / name).exists())
            if there:
                return ValueError(f"{self._folder} holds {shown(there)} already: give another folder, or remove them")
            self._folder.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # noqa: BLE001 - returned
            return error
        return None

    def write(self, values: Tensor) -> Exception | None:
        """Write the next tensor, converted to its planned data type."""
        try:
            number, tensor = next(self._turns)
            self._advance(number)
            stored = values.to("cpu", tensor.dtype).contiguous()  # it has to outlive the view of its bytes
            if self._open is not None:
                self._open.write(byte_view(stored))
        except Exception as error:  # noqa: BLE001 - returned
            self._discard()
            return error
        return None

    def finish(self) -> Exception | None:
        """Give all files their names, the index last."""
        try:
            self._advance(len(self._files))
            if len(self._files) > 1:
                self._temporary(INDEX).write_text(self._index(), encoding="utf-8")
            for name in [*self.names, *([INDEX] if len(self._files) > 1 else [])]:
                self._temporary(name).rename(self._folder / name)
                self._renamed.append(self._folder / name)
        except Exception as error:  # noqa: BLE001 - returned
            self._discard()
            return error
        return None

    def _advance(self, number: int) -> None:
        """Close files up to ``number`` and open that one; files without tensors come into being, too."""
        while self._number < number:
            if self._open is not None:
                self._open.flush()
                os.fsync(self._open.fileno())
                self._open.close()
                self._open = None
            self._number += 1
            if self._number < len(self._files):
                self._open = self._temporary(self.names[self._number]).open("wb")
                self._open.write(header(self._files[self._number], self._tied))

    def _index(self) -> str:
        pairs = zip(self.names, self._files, strict=True)
        weight_map = {tensor.name: name for name, tensors in pairs for tensor in tensors}
        total = sum(tensor.nbytes for tensors in self._files for tensor in tensors)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.tmp"

    def _discard(self) -> None:
        if self._open is not None:
            self._open.close()
        for name in (*self.names, INDEX):
            self._temporary(name).unlink(missing_ok=True)
        for path in self._renamed:
            path.unlink(missing_ok=True)


def _check_dtypes(tensors: Iterable[Planned]) -> None:
    for tensor in tensors:
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{tensor.name!r} is {tensor.dtype}, for which the safetensors format has no name; nothing was "
                "written. Convert it, or save a checkpoint instead"
            )


# Reading #


def _weight_map(path: Path) -> dict[str, Path]:
    """Return the file of each tensor as the index says; empty where there is none."""
    index = path / INDEX if path.is_dir() else path
    if index.suffix != ".json" or not index.exists():
        return {}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): index.parent / str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of safetensors files: {error!r}; it needs a table 'weight_map'"
        ) from None


def _single(path: Path) -> Path:
    if path.is_dir():
        found = [path / SINGLE] if (path / SINGLE).exists() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{path} holds {len(found)} .safetensors files and no {INDEX}: name the file to load")
        return found[0]
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: give a .safetensors file, an index (.json) or a folder that holds one"
        )
    return path


def _read_header(path: Path) -> dict[str, Stored]:
    if not path.exists():
        raise ValueError(f"{path} does not exist, though the index names it")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path} is no safetensors file, or cut off: a header of {length} bytes in {size}")
        text = file.read(length)
    try:
        return dict(_entries(path, json.loads(text), size - 8 - length, 8 + length))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is wrong ({error!r})") from None


def _entries(path: Path, table: Mapping[str, Any], num_bytes: int, first: int) -> Iterator[tuple[str, Stored]]:
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} is of type {entry['dtype']}, which is not read here")
        dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or begin < 0 or end > num_bytes:
            raise ValueError(
                f"{path}: tensor {name!r} of shape {list(shape)} stands at bytes {begin} to {end} of {num_bytes}: the "
                "file is damaged or cut off"
            )
        yield name, Stored(path, dtype, shape, first + begin)
