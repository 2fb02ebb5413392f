"""Compiled kernels on disk: each is compiled once for a machine, not once for each process."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..._env import CACHE_VARIABLE

_DIGEST_SIZE = hashlib.sha256().digest_size
_logger = logging.getLogger(__name__)


class KernelCache:
    """Files of one folder, each a digest and then the compiled kernel.

    A file appears whole or not at all, so processes that start together may share the folder. What is damaged is
    made again and replaced; a folder that cannot be written costs the same again in the next process. Both are logged.

    Args:
        folder: Where the files are; made when the first is written. None: nothing is kept.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = KernelCache(Path(folder))
        ...     cache.get("scale-sm_90", lambda: b"machine code"), cache.get("scale-sm_90", lambda: b"not called")
        (b'machine code', b'machine code')
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return what is kept under ``key``; if there is nothing, make and keep it."""
        if self._folder is None:
            return make()
        path = self._folder / f"{key}.cubin"
        kept = self._read(path)
        if kept is None:
            kept = make()
            self._write(path, kept)
        return kept

    def _read(self, path: Path) -> bytes | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _logger.warning("the compiled kernel %s cannot be read (%s); compiling it again", path, error)
            return None
        digest, kept = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
        if hashlib.sha256(kept).digest() != digest:
            _logger.warning("the compiled kernel %s is damaged; compiling it again", path)
            return None
        return kept

    def _write(self, path: Path, kept: bytes) -> None:
        temporary = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
                temporary = Path(file.name)
                file.write(hashlib.sha256(kept).digest() + kept)
            temporary.replace(path)
        except OSError as error:
            _logger.warning(
                "the compiled kernel %s cannot be kept (%s); set %s to a folder that can be written",
                path,
                error,
                CACHE_VARIABLE,
            )
            if temporary is not None:
                temporary.unlink(missing_ok=True)
