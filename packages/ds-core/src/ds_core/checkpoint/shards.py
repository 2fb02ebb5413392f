"""One rank's shard files: what goes into which file, and writing it as a stream with hashes.

[Note: Shards]
A rank's *pieces* (protocols.Piece) are cut into *chunks* of at most ``piece_bytes``, the unit of hashing; one
chunk is one PieceRecord. Chunks fill *parts*, files of at most ``part_bytes``. Chunks that follow each other
both in a part and in a tensor are one *entry* of the file's header, so that other readers see long tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from .container import Entry, byte_view, dtype_name, encode_header
from .filesystem import Filesystem
from .layout import shard_name
from .manifest import RAW, FileRecord, PieceRecord, Share, TensorRecord, canonical, digest
from .pieces import Interval, cut

if TYPE_CHECKING:
    from ..protocols import PartState, Piece

_MAX_ITEM_NBYTES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """Sizes of files and of hashed pieces."""

    part_bytes: int = 4 << 30
    """Data per shard file at most; 4 GiB keeps files few, and each small enough to be copied again."""
    piece_bytes: int = 16 << 20
    """Data under one hash at most: what a read verifies even if it wants a single element."""

    def __post_init__(self) -> None:
        """Check the order of the sizes."""
        if not _MAX_ITEM_NBYTES <= self.piece_bytes <= self.part_bytes:
            raise ValueError(
                f"need {_MAX_ITEM_NBYTES} <= piece_bytes <= part_bytes, "
                f"got piece_bytes={self.piece_bytes}, part_bytes={self.part_bytes}"
            )


class Chunk(NamedTuple):
    """Elements that are written and hashed at once. See [Note: Shards]."""

    tensor: int  # index into the rank's tensor records
    start: int  # in the whole tensor
    data: Tensor  # 1D, a view of live memory

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.data.numel()

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.data.numel() * self.data.element_size()


class Written(NamedTuple):
    """One part on the disk."""

    file: FileRecord
    pieces: list[PieceRecord]


def write_share(folder: Path, state: PartState, *, rank: int, config: SaveConfig, filesystem: Filesystem) -> Share:
    """Write this rank's pieces into ``folder`` and wait until they are on the disk.

    Reads the live memory in place; only what is not contiguous CPU memory is copied, one chunk at a time.

    Args:
        folder: The draft, made by rank 0.
        state: What to write.
        rank: Goes into the file names.
        config: Sizes.
        filesystem: How to write.

    Returns:
        Records of what was written.

    Raises:
        ValueError: A piece is not an interval of its tensor, or its data type has no name in the format.
        RuntimeError: The folder is not visible from this rank.
    """
    if not folder.is_dir():
        raise RuntimeError(f"{folder}, made by rank 0, is not visible here: save into a directory that all ranks share")
    scalars = canonical(state.scalars)  # first: what is not JSON should fail before gigabytes are written
    # Large types first: then every tensor is aligned in its file.
    pieces = sorted(state.pieces, key=lambda piece: -piece.data.element_size())
    index_of: dict[TensorRecord, int] = {}
    chunks: list[Chunk] = []
    for piece in pieces:
        index = index_of.setdefault(_describe(piece), len(index_of))
        chunks.extend(_chunks(piece, index, config.piece_bytes))
    tensors = list(index_of)
    staging = _Staging(config.piece_bytes)
    parts = [
        _write_part(folder / shard_name(rank, index), part, tensors, staging=staging, filesystem=filesystem)
        for index, part in enumerate(_parts(chunks, config.part_bytes))
    ]
    filesystem.sync_folder(folder)
    return Share(
        shapes={name: tuple(shape) for name, shape in state.shapes.items()},
        scalars=scalars,
        tensors=tensors,
        files=[part.file for part in parts],
        pieces=[piece._replace(file=index) for index, part in enumerate(parts) for piece in part.pieces],
    )


def _describe(piece: Piece) -> TensorRecord:
    end = piece.start + piece.data.numel()
    if piece.data.dim() != 1 or piece.start < 0 or end > piece.shape.numel():
        raise ValueError(
            f"a piece is a 1D interval of its tensor; {piece.role}/{piece.name} has {piece.shape.numel()} "
            f"elements, got data of shape {list(piece.data.shape)} from element {piece.start} on"
        )
    return TensorRecord(piece.role, piece.name, tuple(piece.shape), dtype_name(piece.data.dtype), RAW)


def _chunks(piece: Piece, tensor: int, piece_bytes: int) -> Iterator[Chunk]:
    data = piece.data.detach()
    for part in cut(Interval(0, data.numel()), piece_bytes // data.element_size()):
        yield Chunk(tensor, piece.start + part.start, data[part.start : part.end])


def _parts(chunks: Sequence[Chunk], part_bytes: int) -> Iterator[list[Chunk]]:
    part: list[Chunk] = []
    nbytes = 0
    for chunk in chunks:
        if nbytes + chunk.nbytes > part_bytes:
            yield part
            part, nbytes = [], 0
        part.append(chunk)
        nbytes += chunk.nbytes
    if part:
        yield part


def _entries(chunks: Sequence[Chunk], tensors: Sequence[TensorRecord]) -> Iterator[Entry]:
    """Yield one header entry per run of consecutive chunks."""
    first = 0
    for index, chunk in enumerate(chunks):
        is_last = index + 1 == len(chunks)
        if is_last or chunks[index + 1].tensor != chunk.tensor or chunks[index + 1].start != chunk.end:
            span = Interval(chunks[first].start, chunk.end)
            numel = span.end - span.start
            tensor = tensors[chunk.tensor]
            yield Entry(f"{tensor}{span}", tensor.dtype, numel, numel * chunk.data.element_size())
            first = index + 1


class _Staging:
    """Memory through which chunks go that cannot be written from where they are."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._buffer: Tensor | None = None  # uint8, 1D; made when first needed

    def host_view(self, data: Tensor) -> memoryview:
        """Return the bytes of ``data``, valid until the next call."""
        if data.device.type == "cpu" and data.is_contiguous():
            return byte_view(data)
        if self._buffer is None:
            # Page-locked memory: a copy from a GPU into other memory goes through a second, hidden buffer.
            self._buffer = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=data.is_cuda)
        staged = self._buffer[: data.numel() * data.element_size()].view(data.dtype)
        staged.copy_(data)
        return byte_view(staged)


def _write_part(
    path: Path,
    chunks: Sequence[Chunk],
    tensors: Sequence[TensorRecord],
    *,
    staging: _Staging,
    filesystem: Filesystem,
) -> Written:
    header = encode_header(_entries(chunks, tensors))
    offset = len(header)
    pieces = []
    with filesystem.create(path) as file:
        filesystem.write(file, header)
        for chunk in chunks:
            view = staging.host_view(chunk.data)
            filesystem.write(file, view)
            pieces.append(
                PieceRecord(chunk.tensor, 0, offset, offset + len(view), chunk.start, chunk.end, digest(view))
            )
            offset += len(view)
        filesystem.sync(file)
    return Written(FileRecord(path.name, offset, len(header), digest(header)), pieces)
