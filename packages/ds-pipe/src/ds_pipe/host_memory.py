"""What the C library does with memory that was freed.

[Note: Freed memory]
A pipeline keeps the activations of several micro-batches, and frees them again. glibc gives what is free at the end of
its heap back to the system, some megabytes at a time, and gets it anew a moment later: the system then clears every
page of it, at the first touch. On a virtual machine that took 6 us for 4 KiB, up to a tenth of a step on the CPU.
"""

from __future__ import annotations

import ctypes
import logging

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGEST = (1 << 30, 1 << 25)  # bytes; larger tensors still come from the system; older versions allow the second only
_log = logging.getLogger(__package__)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next tensors; see [Note: Freed memory].

    Holds for all of the process, until it ends: its resident memory stays what it has been at most, and tensors of
    less than 1 GiB come from the heap; of less than 32 MiB, which is logged, where glibc allows no more. Nothing
    changes for memory of a GPU.

    Raises:
        RuntimeError: The C library has no ``mallopt`` (it is not glibc), or refuses.

    Example:
        >>> keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError as error:
        raise RuntimeError("freed memory can be kept with glibc only, whose mallopt is not there") from error
    limit = next((limit for limit in _LARGEST if mallopt(_MMAP_THRESHOLD, limit)), None)
    if limit is None or not mallopt(_TRIM_THRESHOLD, -1):  # -1: never give back
        raise RuntimeError("glibc's mallopt has refused to keep freed memory; leave out keep_freed_memory")
    if limit != _LARGEST[0]:
        _log.warning("freed memory is kept of tensors below %d MiB only, the most this glibc allows", limit >> 20)
