"""Counts what a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class KeptBytes:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.nbytes = 0.0


@contextmanager
def keeping(module: nn.Module, saved: set[int]) -> Iterator[KeptBytes]:
    """Within the block, count the bytes of storages that autograd saves, each once, but for those of ``module`` itself.

    Args:
        module: Its parameters and buffers do not count.
        saved: Addresses of storages that do not count either; those that do are added.

    Example:
        >>> layer, given = nn.Linear(2, 3), torch.ones(4, 2)
        >>> with keeping(layer, set()) as kept:
        ...     out = layer(given)
        >>> kept.nbytes
        32.0
    """
    own = {known.untyped_storage().data_ptr() for known in (*module.parameters(), *module.buffers())}
    counted = KeptBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | saved:
            saved.add(storage.data_ptr())
            counted.nbytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
