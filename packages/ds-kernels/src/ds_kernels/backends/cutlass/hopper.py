"""Products for Hopper: a module of its own, built by nvcc where that was asked for; see the README."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_CAPABILITY = (9, 0)  # sm_90a: its tensor cores' instructions exist on no other


Pointers = tuple[int, int, int, int, int]  # of what is multiplied, weight, bias (or 0), out, what is inside the GELU
Sizes = tuple[int, int, int]  # rows, columns, inner length


class Module(Protocol):
    """``_hopper``."""

    def workspace_bytes(self, op: str, dtype: str, sizes: Sizes, multiprocessors: int) -> int:
        """Return the bytes of memory that a launch needs besides its tensors."""

    def run(  # noqa: PLR0917 - all positional in C++
        self, op: str, dtype: str, pointers: Pointers, sizes: Sizes, multiprocessors: int, workspace: int, stream: int
    ) -> None:
        """Enqueue the kernel."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launch goes."""

    device: int  # its index, which the CUDA runtime takes from the thread; -1: no GPU
    multiprocessors: int
    stream: int


@dataclass(frozen=True, slots=True)
class Hopper:
    """Products on GPUs of compute capability 9.0: TMA, warp-specialised, the GELU or its slope in the epilogue.

    Args:
        module: The kernels.
    """

    module: Module

    def serves(self, device: torch.device) -> bool:
        """Whether the kernels run on ``device``."""
        return device.type == "cuda" and torch.cuda.get_device_capability(device) == _CAPABILITY

    def place(self, device: torch.device) -> Place:
        """Return the size of ``device``, which has an index, and torch's current stream there."""
        size = torch.cuda.get_device_properties(device).multi_processor_count
        return Place(device.index, size, torch.cuda.current_stream(device).cuda_stream)

    def linear_gelu(self, place: Place, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        """Fill the last two of x, weight, bias, out and what is inside the GELU.

        All must be contiguous, start on 16-byte boundaries, and have rows of whole 16-byte units.

        Raises:
            RuntimeError: If CUTLASS or CUDA refuses.
        """
        x, weight, bias, out, inside = tensors
        columns, inner = weight.shape
        pointers = (x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), inside.data_ptr())
        self._run("linear_gelu", place, x, pointers, (x.numel() // inner, columns, inner))

    def linear_dgelu(self, place: Place, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Fill the last of the gradient, weight, what is inside the GELU, and out; as :meth:`linear_gelu`."""
        grad, weight, inside, out = tensors
        inner, columns = weight.shape
        pointers = (grad.data_ptr(), weight.data_ptr(), 0, out.data_ptr(), inside.data_ptr())
        self._run("linear_dgelu", place, grad, pointers, (grad.numel() // inner, columns, inner))

    def _run(self, op: str, place: Place, like: Tensor, pointers: Pointers, sizes: Sizes) -> None:
        dtype = str(like.dtype).removeprefix("torch.")
        size = self.module.workspace_bytes(op, dtype, sizes, place.multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device)
        at = workspace.data_ptr() if size else 0
        with torch.cuda.device(place.device):
            self.module.run(op, dtype, pointers, sizes, place.multiprocessors, at, place.stream)


@functools.cache
def built_hopper() -> Hopper | None:
    """Return the kernels if they were built."""
    try:
        from ... import _hopper
    except ImportError:
        return None
    return Hopper(_hopper)
