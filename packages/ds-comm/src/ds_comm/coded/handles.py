"""What calls under way need: something to do at the end, and memory for their payloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Handle


class After:
    """A collective, and what is done when it has arrived; plays the role ``Handle``."""

    __slots__ = ("_finish", "_handle")

    def __init__(self, handle: Handle, finish: Callable[[], None]) -> None:
        self._handle = handle
        self._finish = finish

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written. Called once."""
        self._handle.wait()
        self._finish()


class Scratch:
    """Bytes for payloads, kept from call to call, since fresh memory costs page faults.

    Args:
        comm: Whose memory is best sent.
    """

    def __init__(self, comm: Collectives) -> None:
        self._comm = comm
        self._free: list[Tensor] = []

    def borrow(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return at least ``num_bytes`` bytes. Paired with :meth:`give_back`."""
        fitting = [memory for memory in self._free if memory.numel() >= num_bytes]
        if not fitting:
            # what is too small for this call would only be held in vain beside the new memory
            self._free.clear()
            return self._comm.allocate(num_bytes, torch.empty(0, dtype=torch.uint8, device=device))
        memory = min(fitting, key=Tensor.numel)
        self._free = [free for free in self._free if free is not memory]
        return memory

    def give_back(self, memory: Tensor) -> None:
        """Take ``memory`` back: nothing of it is in flight."""
        self._free.append(memory)
