"""State moved to host memory between phases of training, and back.

[Note: Parking]
A storage is copied to the host and its memory given back to the device; the storage *object* stays, so that shards,
masters and the optimizer's tensors, which are views of it, are valid again after it has been filled. Storages that are
on the host already stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .config import check_names

if TYPE_CHECKING:
    from .flat import Flat

KINDS = ("params", "masters", "optimizer", "gradients")
"""What can be moved: compute parameters as they are kept from step to step, masters, optimizer state, gradient sums."""


def states_of(flats: Iterable[Flat], optimizer: torch.optim.Optimizer | None) -> dict[str, list[Tensor]]:
    """Return the tensors of each of :data:`KINDS`.

    What an optimizer steps counts as masters: most are views of them, whole tensors of which a rank's shard has but a
    part are copies.
    """
    flats = list(flats)
    groups: list[dict[str, Any]] = [] if optimizer is None else optimizer.param_groups
    held = [] if optimizer is None else pytree.tree_leaves(list(optimizer.state.values()))
    return {
        "params": [flat.kept for flat in flats],
        "masters": [*(flat.master for flat in flats), *(param for group in groups for param in group["params"])],
        "optimizer": [value for value in held if isinstance(value, Tensor)],
        "gradients": [tensor for flat in flats if flat.gradient is not None for tensor in flat.gradient.tensors()],
    }


class Parked(NamedTuple):
    """A storage without memory, and its contents."""

    storage: torch.UntypedStorage
    host: Tensor  # 1D, bytes


def park(storage: torch.UntypedStorage, *, pin_memory: bool = True) -> Parked:
    """Move the contents of ``storage`` to the host; into pinned memory if it comes from a GPU, for speed.

    Example:
        >>> tensor = torch.arange(3)
        >>> parked = park(tensor.untyped_storage())
        >>> tensor.untyped_storage().nbytes()
        0
        >>> unpark(parked)
        >>> tensor
        tensor([0, 1, 2])
    """
    nbytes = storage.nbytes()
    pinned = pin_memory and storage.device.type == "cuda"
    host = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    host.copy_(_bytes(storage))
    storage.resize_(0)
    return Parked(storage, host)


def unpark(parked: Parked) -> None:
    """Move the contents back."""
    parked.storage.resize_(parked.host.numel())
    _bytes(parked.storage).copy_(parked.host)


class Parking:
    """See [Note: Parking]. Found at ``sharded.parking``.

    Args:
        module: The partitioned model; it refuses to run while any state is away.
        tensors: Returns the tensors of each kind; called when they are to be moved.
        release: Gives back what is held besides: whole parameters and pooled memory.
    """

    kinds = KINDS

    def __init__(
        self, module: nn.Module, tensors: Callable[[], Mapping[str, Iterable[Tensor]]], release: Callable[[], None]
    ) -> None:
        self._module = module
        self._tensors = tensors
        self._release = release
        self._parked: list[Parked] = []
        self.away = False  # whether any state is in host memory
        self._guards: list[Any] = []

    def offload_states(self, include: Iterable[str] = KINDS, *, pin_memory: bool = True) -> dict[str, int]:
        """Move state to host memory, until :meth:`reload_states`.

        Until then the model cannot be run, stepped, saved or read.

        Args:
            include: Of :data:`KINDS`. A tensor that is of two kinds (in float32, parameters are their own masters) is
                moved with the first one named here.
            pin_memory: Whether the host memory is pinned, for speed, where the device is a GPU.

        Returns:
            Bytes that each kind freed on the device: 0 on a CPU, whose memory is the host's, and nothing is moved.

        Raises:
            ValueError: There is no such kind.
            RuntimeError: State has been moved already.
        """
        check_names("include", include)
        kinds = list(dict.fromkeys(include))
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"there are no states {', '.join(map(repr, unknown))}; there are {', '.join(KINDS)}")
        self.check()
        self._release()
        tensors = self._tensors()
        freed = {kind: self._move(tensors[kind], pin_memory=pin_memory) for kind in kinds}
        for device in {parked.storage.device for parked in self._parked}:
            torch.get_device_module(device).empty_cache()
        return freed

    def reload_states(self) -> int:
        """Move back what :meth:`offload_states` moved; returns the bytes."""
        for parked in self._parked:
            unpark(parked)
        nbytes = sum(parked.host.numel() for parked in self._parked)
        self._parked.clear()
        self.away = False
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        return nbytes

    def check(self, *_call: object) -> None:
        """Raise if any state is in host memory."""
        if self.away:
            raise RuntimeError("states of this model are in host memory: call reload_states() first")

    def _move(self, tensors: Iterable[Tensor], *, pin_memory: bool) -> int:
        moved = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not _is_on_host(storage) and storage.nbytes():
                if not self._parked:
                    self._guards.append(self._module.register_forward_pre_hook(self.check, prepend=True))
                self._parked.append(park(storage, pin_memory=pin_memory))
                self.away = True
                moved += self._parked[-1].host.numel()
        return moved


def _is_on_host(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
