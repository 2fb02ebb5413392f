"""Kernels for Hopper, from csrc/hopper; there only where it was asked for when the package was built.

``dtype`` is ``bfloat16`` or ``float16``; pointers are addresses of x, weight, bias, out and what is inside; sizes are
rows, columns and the inner length.
"""

_Pointers = tuple[int, int, int, int, int]
_Sizes = tuple[int, int, int]

def check(dtype: str, pointers: _Pointers, sizes: _Sizes) -> None:
    """Raise ValueError or RuntimeError if the kernel does not take these; needs no GPU."""

def workspace_bytes(dtype: str, sizes: _Sizes, multiprocessors: int) -> int:
    """Return how much memory of the device a launch needs besides its tensors."""

def linear_gelu(
    dtype: str, pointers: _Pointers, sizes: _Sizes, multiprocessors: int, workspace: int, stream: int
) -> None:
    """Enqueue the kernel on ``stream``."""
