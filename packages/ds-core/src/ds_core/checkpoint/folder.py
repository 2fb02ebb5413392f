"""One checkpoint's folder on the disk: its manifest, sizes of files, bytes checked against their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layout import MANIFEST, published_tags
from .manifest import FileRecord, Manifest, PieceRecord, decode_manifest, digest
from .pieces import Interval
from .problems import CheckpointError


def read_manifest(folder: Path) -> Manifest:
    """Return the folder's manifest.

    Raises:
        CheckpointError: It is missing, unreadable, truncated or changed.
    """
    path = folder / MANIFEST
    try:
        return decode_manifest(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def size_problems(folder: Path, files: Sequence[FileRecord]) -> list[str]:
    """Return one line for each file that is missing or not as long as it was written; reads no data."""
    problems = []
    for file in files:
        try:
            nbytes = (folder / file.name).stat().st_size
        except OSError as error:
            problems.append(f"{file.name} cannot be read: {error.strerror}")
        else:
            if nbytes != file.nbytes:
                problems.append(f"{file.name} has {nbytes} bytes, the manifest says {file.nbytes}")
    return problems


def header_problem(folder: Path, file: FileRecord) -> str | None:
    """Return what is wrong with the file's header, or None."""
    header = memoryview(bytearray(file.header_nbytes))
    return _problem(folder / file.name, Interval(0, file.header_nbytes), file.header_hash, header)


def piece_problem(folder: Path, manifest: Manifest, piece: PieceRecord, into: memoryview) -> str | None:
    """Read one piece.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        piece: What to read.
        into: Filled with the piece's bytes, whether or not they are right; exactly as long.

    Returns:
        What is wrong with the bytes, naming file, tensor and interval; None if they are as written.
    """
    path = folder / manifest.files[piece.file].name
    problem = _problem(path, Interval(piece.start_byte, piece.end_byte), piece.hash, into)
    if problem is None:
        return None
    return f"{manifest.tensors[piece.tensor]}, elements {Interval(piece.start, piece.end)}: {problem}"


def advice(folder: Path, previous: str | None = None) -> str:
    """Return what to do about a damaged checkpoint: which other one to load."""
    others = [tag for tag in published_tags(folder.parent) if tag != folder.name]
    if previous in others:
        return f"load the checkpoint before it: tag {previous!r}"
    if others:
        return f"load another tag of {folder.parent}: {', '.join(others)}"
    return f"there is no other checkpoint in {folder.parent}"


def _problem(path: Path, span: Interval, expected: str, into: memoryview) -> str | None:
    where = f"bytes {span} of {path.name}"
    try:
        num_read = _read(path, span.start, into)
    except OSError as error:
        return f"{where} cannot be read: {error.strerror}"
    if num_read < len(into):
        return f"{where} end at byte {span.start + num_read}: the file is truncated"
    got = digest(into)
    if got != expected:
        return f"{where} have hash {got}, written was {expected}: the file was changed or the disk is failing"
    return None


def _read(path: Path, start: int, into: memoryview) -> int:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        num_read = 0
        # One call reads at most 2 GiB on Linux.
        while num_read < len(into) and (n := file.readinto(into[num_read:])):
            num_read += n
    return num_read
