"""Memory that other processes of this host can read: windows.

A window is one anonymous shared mapping (``memfd_create``) of one or many tensors. It has no name in any file system,
so nothing is left behind however a process ends, and no limit but that of memory (the size of /dev/shm is none). Its
descriptor travels once to each reader, over a Unix socket, and is closed then; the memory lives as long as a tensor
here or a mapping there refers to it.

A process that is forked shares the windows of its parent: it must not write to parameters. It also keeps its parent's
sockets open, so that the parent's end is noticed only with its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 28

Memory: TypeAlias = "ctypes.Array[ctypes.c_ubyte]"
"""Mapped bytes; unmapped with the last reference."""


class Windows:
    """The windows of one process, found by the address at which they begin.

    Args:
        readers: Ranks that will map them.

    Example:
        >>> windows = Windows(readers=[1])
        >>> memory = windows.allocate(16, torch.zeros(0))
        >>> windows.at[memory.data_ptr()]
        (0, 0)
    """

    def __init__(self, readers: Iterable[int]) -> None:
        self._readers = frozenset(readers)
        self.at: dict[int, tuple[int, int]] = {}  # window and offset in it, by the address where a tensor begins
        self._chunk: tuple[Memory, int] | None = None  # a window that small tensors share, and its number
        self._used = 0  # bytes of it
        self.gone: list[int] = []  # that went away; whoever tells their readers empties it
        self.undelivered: dict[tuple[int, int], int] = {}  # descriptors, by window and reader
        self._num_made = 0
        weakref.finalize(self, _close_all, self.undelivered).atexit = False

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return 1D zeros of ``like``'s data type in a window.

        Small tensors share windows: until its descriptor is sent, a window takes one of a thousand that a process has.
        Pages that nobody touches take no memory.
        """
        nbytes = -(-max(numel * like.element_size(), 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        if nbytes > _CHUNK_BYTES // 4:
            chunk, window, offset = *self._make(nbytes), 0
        else:
            if self._chunk is None or self._used + nbytes > _CHUNK_BYTES:
                self._chunk, self._used = self._make(_CHUNK_BYTES), 0
            (chunk, window), offset = self._chunk, self._used
            self._used += nbytes
        part = (ctypes.c_ubyte * nbytes).from_buffer(chunk, offset)
        address = ctypes.addressof(part)
        self.at[address] = window, offset
        # the address may belong to other memory afterwards
        weakref.finalize(part, self.at.pop, address).atexit = False
        return torch.frombuffer(part, dtype=like.dtype, count=max(numel, 1))[:numel]

    def _make(self, nbytes: int) -> tuple[Memory, int]:
        fd = os.memfd_create("ds-zero", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        memory, window = _map(fd, nbytes), self._num_made
        self._num_made += 1
        self.undelivered |= {(window, reader): fd for reader in self._readers}
        # weakly: a finalizer that held this object would hold the chunk in it, and so itself
        weakref.finalize(memory, _forget, weakref.ref(self), window).atexit = False
        return memory, window

    def delivered(self, window: int, reader: int) -> None:
        """Note that ``reader`` has been sent the descriptor."""
        fd = self.undelivered.pop((window, reader))
        if fd not in self.undelivered.values():
            os.close(fd)

    def forget(self, window: int) -> None:
        """Note that a window's memory is free."""
        for reader in self._readers:
            if (window, reader) in self.undelivered:
                self.delivered(window, reader)
        self.gone.append(window)


def _forget(windows: weakref.ref[Windows], window: int) -> None:
    alive = windows()
    if alive is not None:
        alive.forget(window)


def _close_all(undelivered: dict[tuple[int, int], int]) -> None:
    for fd in set(undelivered.values()):
        os.close(fd)
    undelivered.clear()


def map_window(fd: int) -> Memory:
    """Return the memory of another process's window, and close ``fd``."""
    try:
        return _map(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _map(fd: int, nbytes: int) -> Memory:
    """Map ``fd``; the mapping goes with the last reference to what is returned.

    Python's own ``mmap`` keeps a duplicate of the descriptor, and a process may have a thousand.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes of shared memory")
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, libc.munmap, address, nbytes).atexit = False
    return memory
