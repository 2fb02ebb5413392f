"""Optimizers that need whole tensors: each tensor is stepped by one rank, whatever the shards are.

[Note: Owners]
Flats stay cut anywhere. At the step the slices of a gradient travel to the tensor's owner, which steps a parameter of
the real shape in float32; the slices of the new values travel back into the shards. Each direction is one exchange
for all tensors. A tensor that lies in its owner's shard as a whole does not travel: the owner's parameter is a view of
the master there. Under replicated optimizer state (and on one rank) that holds for every tensor on every rank, so each
rank steps all of them and nothing is sent.

Owners are chosen once, so that the dearest rank is as cheap as it gets (:func:`balance`). The optimizer's state
lives with the owner, and is exported there: it does not depend on owners or shards.

Memory: float32 values of the owned tensors that do not lie in the owner's shard, and the optimizer's state; during
the step their gradients, and what is being sent. Volume per rank and step: what it holds of other ranks' tensors, and
what other ranks hold of its own, as gradients one way and as values the other.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .flat import Flat, Update
from .layout import Layout, Slot
from .owners import Owned, Slice, balance, inside, routes

if TYPE_CHECKING:
    from ds_core.protocols import ShardUpdate, UpdateRule

    from .kinds import UpdateKind
    from .mesh import Holders

_KEY = (1 << 20) + 1  # of exchanges, apart from the keys of buffers


class Stepped(NamedTuple):
    """A tensor that this rank steps."""

    slot: Slot
    param: nn.Parameter  # ND, float32
    home: tuple[int, int] | None  # flat and segment whose master ``param`` is a view of, or None
    exported: bool  # whether its optimizer state is exported here: on one of the ranks that step it


class WholeTensors:
    """See [Note: Owners]; with no parameter group of such a kind, it holds nothing and does nothing.

    Args:
        flats: The flats with a gradient, on every rank in the same order.
        kinds: Of each parameter group.
        holders: The ranks among which optimizer state is cut.
        gradient_dtype: Data type of reduced gradients.
    """

    def __init__(
        self, flats: Sequence[Flat], kinds: Sequence[UpdateKind], holders: Holders, gradient_dtype: torch.dtype
    ) -> None:
        self.groups = [group for group, kind in enumerate(kinds) if kind.whole]
        self._flats = list(flats)
        self._gradient_dtype = gradient_dtype
        self._comm = comm = holders.comm
        layouts = [flat.layout for flat in flats]
        self._tensors = _owned(layouts, kinds, comm.size)
        self._segments = _segments_of(flats, self.groups)
        self._stepped = {
            index: self._make_stepped(tensor, exported=index % holders.num_replicas == holders.replica)
            for index, tensor in enumerate(self._tensors)
            if tensor.owner == comm.rank
        }
        # where nothing is cut nothing is sent
        sent = self._tensors if comm.size > 1 else []
        self._away, self._here = routes(sent, layouts, comm.size if sent else 0, comm.rank)
        self.refresh()

    @property
    def stepped(self) -> list[Stepped]:
        """The tensors that this rank steps."""
        return list(self._stepped.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters that are not views of a master."""
        return sum(each.param.nbytes for each in self._stepped.values() if each.home is None)

    @torch.no_grad()
    def update(
        self,
        rule: UpdateRule,
        optimizer: torch.optim.Optimizer,
        units: Sequence[Sequence[ShardUpdate]],
        scale: float,
    ) -> Iterator[int]:
        """Run one step by ``rule`` over whole tensors, and over the shards of all other parameter groups.

        Args:
            rule: Runs the step.
            optimizer: Over the parameters of :attr:`stepped` and the other groups' shards.
            units: Of each flat, the segments with their gradients.
            scale: Factor on the gradients.

        Yields:
            The index of each flat, at the end: nothing can be sent before all of the step is done.
        """
        moved = set(self._segments.values())
        grads = self._collect([[update.grad for update in unit] for unit in units], self._gradient_dtype)
        whole = [
            Update(each.param, grad.view(each.param.shape), None)
            for each, grad in zip(self.stepped, grads, strict=True)
        ]
        rest = [
            update
            for index, unit in enumerate(units)
            for number, update in enumerate(unit)
            if (index, number) not in moved
        ]
        collections.deque(rule(optimizer, [whole, rest], scale), maxlen=0)
        del grads, whole
        self._spread()
        for index, number in moved:
            update = units[index][number]
            if update.copy is not None:
                update.copy.copy_(update.master)
        yield from range(len(units))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the values of the masters, which were written from outside."""
        masters = [[segment.master.detach() for segment in flat.segments] for flat in self._flats]
        for each, values in zip(self.stepped, self._collect(masters, torch.float32), strict=True):
            if each.home is None:
                each.param.copy_(values.view(each.param.shape))

    def _collect(self, values: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
        """Return each stepped tensor's whole values (1D) from those of all segments, by flat and segment."""
        outgoing = [self._packed([self._at(values, part) for part in parts], dtype) for parts in self._away]
        incoming = [self._buffer(parts, dtype) for parts in self._here]
        self._exchange(outgoing, incoming)
        whole = {
            index: self._empty(each.slot.numel, dtype) if each.home is None else values[each.home[0]][each.home[1]]
            for index, each in self._stepped.items()
        }
        for parts, buffer in zip(self._here, incoming, strict=True):
            for part, received in zip(parts, buffer.split([part.numel for part in parts]), strict=True):
                whole[part.tensor][part.start : part.start + part.numel] = received
        return list(whole.values())

    def _spread(self) -> None:
        """Write the values of the stepped tensors into the masters of all ranks."""
        outgoing = [self._packed([self._values_of(part) for part in parts], torch.float32) for parts in self._here]
        incoming = [self._buffer(parts, torch.float32) for parts in self._away]
        self._exchange(outgoing, incoming)
        masters = [[segment.master for segment in flat.segments] for flat in self._flats]
        for parts, buffer in zip(self._away, incoming, strict=True):
            for part, received in zip(parts, buffer.split([part.numel for part in parts]), strict=True):
                self._at(masters, part).copy_(received)

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        if outgoing:
            self._comm.exchange(outgoing, incoming, key=_KEY).wait()

    def _at(self, values: Sequence[Sequence[Tensor]], part: Slice) -> Tensor:
        """Return the entry for what this rank's shards hold of a tensor: all of one segment."""
        tensor = self._tensors[part.tensor]
        flat, segment = self._segments[tensor.flat, tensor.slot.name]
        return values[flat][segment]

    def _values_of(self, part: Slice) -> Tensor:
        return self._stepped[part.tensor].param.view(-1)[part.start : part.start + part.numel]

    def _packed(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat([self._empty(0, dtype), *parts])

    def _buffer(self, parts: Sequence[Slice], dtype: torch.dtype) -> Tensor:
        return self._empty(sum(part.numel for part in parts), dtype)

    def _empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._flats[0].master.device)

    def _make_stepped(self, tensor: Owned, *, exported: bool) -> Stepped:
        flat, slot = self._flats[tensor.flat], tensor.slot
        if not inside(slot, flat.state_range):
            values = self._empty(slot.numel, torch.float32).view(slot.shape)
            return Stepped(slot, nn.Parameter(values), None, exported)
        start = slot.offset - flat.state_range[0]
        values = flat.master[start : start + slot.numel].view(slot.shape)
        return Stepped(slot, nn.Parameter(values), self._segments[tensor.flat, slot.name], exported)


def _owned(layouts: Sequence[Layout], kinds: Sequence[UpdateKind], num_ranks: int) -> list[Owned]:
    found = [
        (index, slot)
        for index, layout in enumerate(layouts)
        for slot in layout.slots
        if slot.numel and kinds[slot.group].whole
    ]
    owners = balance([kinds[slot.group].cost(slot.shape) for _, slot in found], num_ranks)
    return [Owned(index, slot, owner) for (index, slot), owner in zip(found, owners, strict=True)]


def _segments_of(flats: Sequence[Flat], groups: Sequence[int]) -> dict[tuple[int, str], tuple[int, int]]:
    """Return, by flat and name, flat and segment of what this rank's shards hold of each tensor."""
    return {
        (index, overlap.slot.name): (index, number)
        for index, flat in enumerate(flats)
        for number, segment in enumerate(flat.segments)
        if segment.group in groups
        for overlap in flat.layout.overlaps(segment.start, segment.start + segment.master.numel())
    }
