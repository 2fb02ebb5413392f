"""The lock on a directory of checkpoints that every running save shares."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from types import TracebackType
from typing import Final

from .._log import logger
from .layout import LOCK

_NO_LOCKS: Final = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class DirectoryLock:
    """Says whether another save is alive in the same directory; a context manager.

    The kernel frees the lock when its process ends, however it ends, so a killed save never counts as alive.

    Args:
        directory: An existing directory of checkpoints.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, DirectoryLock(Path(folder)) as lock:
        ...     lock.take_alone()
        True
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._file = open(self._path, "ab")  # noqa: SIM115 - closed in __exit__
        self._supported = True

    def __enter__(self) -> DirectoryLock:
        """Share the lock; waits while another save removes leftovers."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._file.close()
                raise
            self._supported = False
        return self

    def take_alone(self) -> bool:
        """Return whether no other save is alive; then none can begin until this one lets go.

        The shared lock is lost when the answer is no, so this is a save's last question.
        """
        if not self._supported:
            logger.warning("%s: this filesystem has no locks, so nobody can say who else is saving here", self._path)
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go."""
        self._file.close()
