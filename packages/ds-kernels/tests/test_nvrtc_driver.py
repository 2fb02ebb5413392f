"""Calls of the driver, against a library with the driver's C interface that writes down what it gets."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
from ds_kernels.backends.nvrtc.driver import Driver

# Signatures as in cuda.h of CUDA 13.
STANDIN = r"""
#include <cstdint>
#include <cstdio>
#include <cstring>
extern "C" {
char log_text[4096];
void* current;
static void note(const char* text) { std::strcat(log_text, text); std::strcat(log_text, "\n"); }
#define NOTE(...) do { char line[256]; std::snprintf(line, sizeof line, __VA_ARGS__); note(line); } while (0)
int cuInit(unsigned flags) { NOTE("init %u", flags); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 100; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)(uintptr_t)(device * 16); return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxPushCurrent_v2(void* context) { NOTE("push %ld", (long)context); current = context; return 0; }
int cuCtxPopCurrent_v2(void** context) { note("pop"); *context = current; current = nullptr; return 0; }
int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned n, void* c, void* d, unsigned m) {
    NOTE("load %.5s %d", (const char*)code, !a && !b && !n && !c && !d && !m);
    *library = (void*)7; return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    NOTE("get %ld %s", (long)library, name);
    *kernel = (void*)0x1234567890;
    return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    NOTE("set %d %d %lx %d", attribute, value, (long)kernel, device); return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    struct Args { double a; int b; };
    const Args& args = *(const Args*)params[0];
    NOTE("launch %lx (%u %u %u) (%u %u %u) %u %lx %.1f %d %d", (long)f, gx, gy, gz, bx, by, bz, shared, (long)stream,
         args.a, args.b, extra == nullptr);
    return gx == 13 ? 701 : 0;
}
int cuGetErrorString(int code, const char** text) { *text = "too many resources requested"; return 0; }
}
"""


class Args(ctypes.Structure):
    _fields_ = (("a", ctypes.c_double), ("b", ctypes.c_int))


@pytest.fixture
def library(tmp_path):
    """A stand-in for libcuda."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to build a stand-in for the driver with")
    (tmp_path / "driver.cpp").write_text(STANDIN)
    command = ["g++", "-shared", "-fPIC", "-w", str(tmp_path / "driver.cpp"), "-o", str(tmp_path / "driver.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(tmp_path / "driver.so"))


def noted(library):
    buffer = (ctypes.c_char * 4096).in_dll(library, "log_text")
    lines = buffer.value.decode().splitlines()
    buffer.value = b""
    return lines


def test_a_kernel_is_loaded_and_launched_in_its_devices_context(library):
    driver = Driver(library)
    kernel = driver.load(b"\x7fELF", "adamw", 2, 65536)
    assert noted(library) == ["init 0", "load \x7fELF 1", "get 7 adamw", "set 8 65536 1234567890 102"]
    for _ in range(2):
        driver.launch(kernel, 2, 0xDEADBEEF00, (3_000_000_000, 5, 256, 1024), Args(1.5, -7))
        launched = "launch 1234567890 (3000000000 5 1) (256 1 1) 1024 deadbeef00 1.5 -7 1"
        assert noted(library) == ["push 1632", launched, "pop"]


def test_the_current_context_is_left_where_it_is_the_devices(library):
    driver = Driver(library)
    kernel = driver.load(b"\x7fELF", "adamw", 0, 0)
    ctypes.c_void_p.in_dll(library, "current").value = 1600
    noted(library)
    driver.launch(kernel, 0, 0, (1, 1, 32, 0), Args(0.0, 0))
    assert noted(library) == ["launch 1234567890 (1 1 1) (32 1 1) 0 0 0.0 0 1"]


def test_what_the_driver_refuses_is_said_in_its_words(library):
    driver = Driver(library)
    kernel = driver.load(b"\x7fELF", "adamw", 0, 0)
    noted(library)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel failed: too many resources requested \(701\)"):
        driver.launch(kernel, 0, 0, (13, 1, 32, 0), Args(0.0, 0))
    assert noted(library)[-1] == "pop"
