"""Weights of a model that is split over tensor-parallel ranks, put together under the names they had before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._control import Control, together
from .weight_file import Planned, WeightFile

if TYPE_CHECKING:
    from .protocols import Sharded
    from .tensor_protocols import SplitModel


class _Whole(NamedTuple):
    """A tensor of the model before it was split."""

    names: Sequence[str]  # it was stored under the first one
    planned: Planned
    parts: Sequence[str]  # where it stands now; a name alone where it is whole


class SplitWeights:
    """Plays the role ``Weights``.

    Args:
        inner: The partitioned model of this rank.
        made: What was split.
        control: The tensor-parallel ranks.
        data: The data-parallel ranks.
        group: The tensor-parallel ranks, for tensors; None: there is one.
        device: Where messages of that group live.
    """

    def __init__(
        self,
        inner: Sharded,
        made: SplitModel,
        *,
        control: Control,
        data: Control,
        group: dist.ProcessGroup | None,
        device: torch.device | None,
    ) -> None:
        self._inner = inner
        self._made = made
        self._control = control
        self._data = data
        self._group = group
        self._device = device or torch.device("cpu")

    def save(self, folder: str | os.PathLike[str], *, name: str, frozen: bool = True) -> dict[str, int]:
        """Write one safetensors file, one tensor after the other; all ranks call it, the first one writes.

        Memory: one whole tensor. Nothing is overwritten; what could not be finished is removed.

        Raises:
            ValueError: The name does not end with ``.safetensors``, or stands in a folder of its own.
            RankError: On all ranks: there is such a file, or it could not be written.
        """
        wanted = self._wanted(frozen=frozen)
        aliases = {further: whole.names[0] for whole in wanted for further in whole.names[1:]}
        first = _First()
        with WeightFile(Path(folder), name, [whole.planned for whole in wanted], aliases) as file:
            if self._writes:
                first.error_of(file.begin)
            self._agree(first.error)
            for values in self._values(wanted):
                if self._writes and values is not None:
                    first.error_of(partial(file.write, values))  # after an error the others still give their parts
            if self._writes:
                first.error_of(file.finish)
        self._agree(first.error)
        return {whole.names[0]: whole.planned.nbytes for whole in wanted}

    def state_dict(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Return whole tensors in host memory on the first rank, under all their names; nothing elsewhere."""
        wanted = self._wanted(frozen=frozen)
        held: dict[str, Tensor] = {}
        for whole, values in zip(wanted, self._values(wanted), strict=True):
            if self._writes and values is not None:
                held |= dict.fromkeys(whole.names, values.to(whole.planned.dtype))
        return held

    @property
    def _writes(self) -> bool:
        return self._control.rank == self._data.rank == 0

    def _agree(self, error: Exception | None) -> None:
        """Raise on all ranks if there is an error on the first."""
        with together(self._data), together(self._control):
            if error is not None:
                raise error

    def _wanted(self, *, frozen: bool) -> list[_Whole]:
        params = dict(self._inner.module.named_parameters(remove_duplicate=False))
        wanted = []
        for name, names in self._made.whole_names.items():
            parts = self._made.parts(name)
            own = next(params[part] for part in parts if part in params)
            if frozen or own.requires_grad:
                wanted.append(_Whole(names, Planned(name, own.dtype, self._made.whole_shapes[name]), parts))
        buffers = _persistent(self._inner.module)
        return wanted + [
            _Whole([name], Planned(name, buffer.dtype, buffer.shape), []) for name, buffer in buffers.items()
        ]

    def _values(self, wanted: Sequence[_Whole]) -> Iterator[Tensor | None]:
        """Yield the tensors whole on the first rank, one at a time; all ranks go through all of them."""
        params = dict(self._inner.module.named_parameters(remove_duplicate=False))
        buffers = dict(self._inner.module.named_buffers())
        for names, planned, parts in wanted:
            if not parts:
                yield buffers[names[0]].detach().to("cpu", copy=True)
                continue
            own = [
                self._inner.access.full_param(part).to(self._device, planned.dtype) for part in parts if part in params
            ]
            if self._data.rank == 0:
                found = self._gathered(own) if len(own) < len(parts) else own
                yield self._made.merged(names[0], [value.cpu() for value in found]) if self._writes else None
            else:
                yield None

    def _gathered(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Return all ranks' tensors on the first one, in the order of the ranks."""
        if self._control.rank:
            for value in own:
                dist.send(value.contiguous(), group=self._group, group_dst=0)
            return []
        found = list(own)
        for rank in range(1, self._control.size):
            for like in own:
                value = torch.empty_like(like)
                dist.recv(value, group=self._group, group_src=rank)
                found.append(value)
        return found


class _First:
    """Runs what may fail on this rank alone, until something does; the others go on until all are told."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def error_of(self, action: Callable[[], None]) -> None:
        """Run ``action``, unless there is an error already, and keep its error."""
        if self.error is None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - raised on all ranks by whoever runs it
                self.error = error


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are state."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in names}
