"""The few functions of the CUDA driver that run a compiled kernel, called through ctypes.

The driver's C interface is the same on every machine with a driver; so kernels that lie compiled on disk need no
package at all, and a struct goes to a kernel by value.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_Handle = ctypes.c_void_p
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def missing_driver() -> str | None:
    """Return why there is no driver to call, in one line; None if there is one. Starts nothing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver is installed ({error})"
    return None


@functools.cache
def driver() -> Driver:
    """Return the driver of this process.

    Raises:
        RuntimeError: If there is none, or it does not start.
    """
    if (reason := missing_driver()) is not None:
        raise RuntimeError(f"{reason}; choose the backend 'reference'")
    return Driver(ctypes.CDLL("libcuda.so.1"))


class Driver:
    """Loads and launches kernels in torch's contexts, which are the devices' primary ones.

    Args:
        library: libcuda.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._contexts: dict[int, _Handle] = {}  # by index of the device
        # Found once: looking a function up costs more than calling it.
        self._launch = library.cuLaunchKernel
        self._launch.argtypes = [_Handle, *[ctypes.c_uint] * 7, _Handle, ctypes.c_void_p, ctypes.c_void_p]
        self._current = library.cuCtxGetCurrent
        self._call("cuInit", ctypes.c_uint(0))

    def load(self, cubin: bytes, name: str, device: int, shared: int) -> _Handle:
        """Return the kernel ``name`` of ``cubin``, allowed ``shared`` bytes on ``device``.

        Raises:
            RuntimeError: If the driver refuses it.
        """
        library, kernel = _Handle(), _Handle()
        none = (None, None, ctypes.c_uint(0))
        self._call("cuLibraryLoadData", ctypes.byref(library), cubin, *none, *none)
        self._call("cuLibraryGetKernel", ctypes.byref(kernel), library, name.encode())
        if shared:
            value, number = ctypes.c_int(shared), self._number(device)
            self._call("cuKernelSetAttribute", ctypes.c_int(_MAX_DYNAMIC_SHARED), value, kernel, number)
        return kernel

    def launch(
        self,
        kernel: _Handle,
        device: int,
        stream: int,
        shape: tuple[int, int, int, int],
        args: ctypes.Structure,
    ) -> None:
        """Enqueue ``kernel`` on ``stream``; returns before it has run.

        Args:
            kernel: What :meth:`load` returned.
            device: Index of the stream's device.
            stream: Its address.
            shape: Blocks in x, blocks in y, threads of a block, bytes of shared memory.
            args: The kernel's one parameter; copied by the driver.

        Raises:
            RuntimeError: If the driver refuses the launch.
        """
        context, current = self._context(device), _Handle()
        self._check(self._current(ctypes.byref(current)), "cuCtxGetCurrent")
        foreign = current.value != context.value  # another device's, or none: a thread that has not used CUDA yet
        if foreign:
            self._call("cuCtxPushCurrent_v2", context)
        try:
            blocks_x, blocks_y, threads, shared = shape
            params = (ctypes.c_void_p * 1)(ctypes.addressof(args))
            code = self._launch(kernel, blocks_x, blocks_y, 1, threads, 1, 1, shared, stream, params, None)
            self._check(code, "cuLaunchKernel")
        finally:
            if foreign:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(_Handle()))

    def _context(self, device: int) -> _Handle:
        context = self._contexts.get(device)
        if context is None:
            context = _Handle()
            # Never released: torch holds the same one until the process ends.
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._number(device))
            self._contexts[device] = context
        return context

    def _number(self, device: int) -> ctypes.c_int:
        number = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device))
        return number

    def _call(self, function: str, *args: Any) -> None:
        self._check(getattr(self._library, function)(*args), function)

    def _check(self, code: int, function: str) -> None:
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            raise RuntimeError(f"{function} failed: {(text.value or b'unknown error').decode()} ({code})")
