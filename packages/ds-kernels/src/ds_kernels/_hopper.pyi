"""Kernels for Hopper, from csrc/hopper; there only where it was asked for when the package was built.

``op`` is ``linear_gelu`` or ``linear_dgelu``, ``dtype`` is ``bfloat16`` or ``float16``; pointers are addresses of what
is multiplied, weight, bias (0: none), out and what is inside the GELU; sizes are rows, columns and the inner length.
"""

_Pointers = tuple[int, int, int, int, int]
_Sizes = tuple[int, int, int]

def check(op: str, dtype: str, pointers: _Pointers, sizes: _Sizes) -> None:
    """Raise ValueError or RuntimeError if the kernel does not take these; needs no GPU."""

def workspace_bytes(op: str, dtype: str, sizes: _Sizes, multiprocessors: int) -> int:
    """Return how much memory of the device a launch needs besides its tensors."""

def run(
    op: str, dtype: str, pointers: _Pointers, sizes: _Sizes, multiprocessors: int, workspace: int, stream: int
) -> None:
    """Enqueue the kernel on ``stream``."""
