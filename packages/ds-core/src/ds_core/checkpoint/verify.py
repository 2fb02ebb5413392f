"""Checking every byte of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

from .assemble import coverage_problems
from .folder import header_problem, piece_problem, read_manifest, size_problems
from .manifest import Manifest
from .pieces import Interval, faults
from .problems import CheckpointError


def verify(path: str | os.PathLike[str], *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Read a checkpoint and compare every byte with what was written.

    Args:
        path: The checkpoint's folder.
        share: ``(rank, size)``: read only every ``size``-th piece, from the ``rank``-th on; all ranks together read
            every byte once. The manifest, and the files' presence and sizes, are checked by each.

    Returns:
        One line per problem, naming file, tensor and interval; empty if there is none.

    Example:
        >>> verify("/nonexistent/global_step7")
        ['/nonexistent/global_step7/manifest.json cannot be read: No such file or directory']
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [*coverage_problems(manifest.tensors, manifest.files, manifest.pieces), *_byte_problems(manifest)]
    readable = set()
    for index, file in enumerate(manifest.files):
        found = size_problems(folder, [file])
        problems += found
        if not found:
            readable.add(index)
    return [*problems, *_content_problems(folder, manifest, share, readable)]


def _byte_problems(manifest: Manifest) -> Iterator[str]:
    """Yield one line per interval of a file that does not stand under exactly one hash."""
    hashed: list[list[Interval]] = [[Interval(0, file.header_nbytes)] for file in manifest.files]
    for piece in manifest.pieces:
        hashed[piece.file].append(Interval(piece.start_byte, piece.end_byte))
    for file, intervals in zip(manifest.files, hashed, strict=True):
        for interval, missing in faults(intervals, file.nbytes):
            yield f"bytes {interval} of {file.name} stand under {'no hash' if missing else 'more than one hash'}"


def _content_problems(
    folder: Path, manifest: Manifest, share: tuple[int, int], readable: Container[int]
) -> Iterator[str]:
    """Yield one line per header and piece of the share that is not what was written.

    Files that are missing or cut are not ``readable``: they would only repeat that problem, piece by piece.
    """
    rank, size = share
    for index in range(rank, len(manifest.files), size):
        problem = header_problem(folder, manifest.files[index]) if index in readable else None
        if problem is not None:
            yield problem
    # In the order of the files, so that a disk is read forwards.
    pieces = sorted(manifest.pieces, key=lambda piece: (piece.file, piece.start_byte))[rank::size]
    pieces = [piece for piece in pieces if piece.file in readable]
    buffer = memoryview(bytearray(max((piece.end_byte - piece.start_byte for piece in pieces), default=0)))
    for piece in pieces:
        problem = piece_problem(folder, manifest, piece, buffer[: piece.end_byte - piece.start_byte])
        if problem is not None:
            yield problem
