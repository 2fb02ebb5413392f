"""The steps by which a save changes a disk, one method each, so that a test can stop it at any of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast


class Filesystem(Protocol):
    """What a save needs of a filesystem; every method may raise :class:`OSError`."""

    def make_folder(self, path: Path) -> None:
        """Make one folder, which must not exist."""

    def create(self, path: Path) -> BinaryIO:
        """Open a new file for writing without a buffer; it must not exist."""

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Append all of ``data``."""

    def sync(self, file: BinaryIO) -> None:
        """Return when the file's contents will survive a loss of power."""

    def sync_folder(self, path: Path) -> None:
        """Return when the names in the folder will survive a loss of power."""

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target`` in one step, replacing a file or empty folder of that name."""

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all it holds; no error if it does not exist."""


class LocalFilesystem:
    """The operating system's, on POSIX."""

    def make_folder(self, path: Path) -> None:
        """Call ``mkdir``."""
        path.mkdir()

    def create(self, path: Path) -> BinaryIO:
        """Call ``open`` with ``O_EXCL``."""
        return cast("BinaryIO", open(path, "xb", buffering=0))

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Call ``write`` until all is written; one call takes at most 2 GiB on Linux."""
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    def sync(self, file: BinaryIO) -> None:
        """Call ``fsync``."""
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Call ``fsync`` on the folder."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Call ``rename``."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Call ``unlink``, for a folder after those of all it holds."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


LOCAL_FILESYSTEM: Final = LocalFilesystem()


def write_file(filesystem: Filesystem, path: Path, data: bytes) -> None:
    """Create ``path`` with ``data`` in it, and wait until the contents are on the disk."""
    with filesystem.create(path) as file:
        filesystem.write(file, data)
        filesystem.sync(file)
