"""The manifest: records of tensors, files and pieces, as JSON that carries a hash of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import xxhash

from .problems import CheckpointError

if TYPE_CHECKING:
    from ..protocols import Json

FORMAT: Final = "ds-checkpoint"
VERSION: Final = 1
RAW: Final = "raw"
"""The codec of row-major, little-endian memory; the only one so far."""

# The last bytes of a manifest: the hash of all bytes before them, placed so that the whole is plain JSON.
_TAIL: Final = ',\n"hash":"{}"}}\n'
_TAIL_NBYTES: Final = len(_TAIL.format(32 * "0"))


class TensorRecord(NamedTuple):
    """One tensor of the model or of its optimizer."""

    role: str
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    codec: str  # how pieces encode elements

    def __str__(self) -> str:
        return f"{self.role}/{self.name}"


class FileRecord(NamedTuple):
    """One shard file; what follows its header is tiled by pieces."""

    name: str
    nbytes: int
    header_nbytes: int
    header_hash: str


class PieceRecord(NamedTuple):
    """One interval of one tensor, hashed by itself so that a partial read verifies what it touches."""

    tensor: int  # index into the manifest's tensors
    file: int  # index into the manifest's files
    start_byte: int  # within the file
    end_byte: int
    start: int  # first element, in the row-major flattened tensor
    end: int
    hash: str


class Share(NamedTuple):
    """What one rank wrote; indices in pieces are into its own lists."""

    shapes: Mapping[str, tuple[int, ...]]
    scalars: str  # as canonical JSON, so that ranks can be compared
    tensors: Sequence[TensorRecord]
    files: Sequence[FileRecord]
    pieces: Sequence[PieceRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a checkpoint except its data."""

    world_size: int
    """Ranks that wrote it."""
    created_ns: int
    """Nanoseconds since 1970 at which it was complete."""
    previous: str | None
    """Tag that ``latest`` named when this one was written."""
    run: Mapping[str, Json]
    """State of the training run, as the caller gave it."""
    scalars: Mapping[str, Json]
    """Hyperparameters and counters of the partitioned state."""
    tensors: Sequence[TensorRecord]
    """All tensors, each once."""
    files: Sequence[FileRecord]
    """All shard files."""
    pieces: Sequence[PieceRecord]
    """All pieces; for each tensor they cover every element exactly once."""


def digest(data: bytes | memoryview) -> str:
    """Return the hash that checkpoints use, 32 hexadecimal digits.

    Example:
        >>> digest(b"")
        '99aa06d3014798d86001c324468d497f'

    Reference:
        Yann Collet, "xxHash: XXH3 128 bits", https://xxhash.com, 2019.
    """
    return xxhash.xxh3_128_hexdigest(data)


def canonical(obj: Json) -> str:
    """Return JSON text that is equal for equal values."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"))


def encode_share(share: Share) -> Json:
    """Return ``share`` as a JSON value."""
    return {
        "shapes": {name: list(shape) for name, shape in share.shapes.items()},
        "scalars": share.scalars,
        "tensors": _rows(share.tensors),
        "files": _rows(share.files),
        "pieces": _rows(share.pieces),
    }


def decode_share(obj: Json) -> Share:
    """Invert :func:`encode_share`."""
    fields = cast("dict[str, Any]", obj)
    return Share(
        shapes={name: tuple(shape) for name, shape in fields["shapes"].items()},
        scalars=fields["scalars"],
        **_records(fields),
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the contents of ``manifest.json``: JSON, one field a line, the last a hash of all before it."""
    fields: dict[str, Json] = {
        "format": FORMAT,
        "version": VERSION,
        "world_size": manifest.world_size,
        "created_ns": manifest.created_ns,
        "previous": manifest.previous,
        "run": manifest.run,
        "scalars": manifest.scalars,
        "tensors": _rows(manifest.tensors),
        "files": _rows(manifest.files),
        "pieces": _rows(manifest.pieces),
    }
    lines = [f'"{name}":{json.dumps(value, separators=(",", ":"))}' for name, value in fields.items()]
    body = ("{" + ",\n".join(lines)).encode()
    return body + _TAIL.format(digest(body)).encode()


def decode_manifest(data: bytes) -> Manifest:
    """Return the manifest whose bytes these are.

    Args:
        data: The contents of ``manifest.json``.

    Returns:
        The records.

    Raises:
        CheckpointError: The bytes are not those that were written, or were written in another format.
    """
    body, tail = data[:-_TAIL_NBYTES], data[-_TAIL_NBYTES:]
    expected_tail = _TAIL.format(digest(body)).encode()
    if tail != expected_tail:
        raise CheckpointError(
            f"the manifest is truncated or was changed: its {len(data)} bytes should end with "
            f"{expected_tail.decode()!r}, got {tail.decode(errors='replace')!r}"
        )
    fields = cast("dict[str, Any]", json.loads(data))
    found = (fields["format"], fields["version"])
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"the manifest is of format {found}, this version reads {(FORMAT, VERSION)}: upgrade ds-core"
        )
    codecs = {row["codec"] for row in fields["tensors"]} - {RAW}
    if codecs:
        raise CheckpointError(f"this version reads the codec {RAW!r}, got {sorted(codecs)}: upgrade ds-core")
    return Manifest(
        world_size=fields["world_size"],
        created_ns=fields["created_ns"],
        previous=fields["previous"],
        run=fields["run"],
        scalars=fields["scalars"],
        **_records(fields),
    )


def _rows(records: Iterable[TensorRecord | FileRecord | PieceRecord]) -> list[Json]:
    return [record._asdict() for record in records]


def _records(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tensors": [TensorRecord(**{**row, "shape": tuple(row["shape"])}) for row in fields["tensors"]],
        "files": [FileRecord(**row) for row in fields["files"]],
        "pieces": [PieceRecord(**row) for row in fields["pieces"]],
    }
