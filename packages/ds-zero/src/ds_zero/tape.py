"""Values that are recorded instead of computed: the operations that make them, and their evaluation.

[Note: Tape]
A deferred tensor has a shape and no memory. Its storage, a :class:`Cell`, points at the :class:`Node` that would have
written it last; a node holds the operation and, as a :class:`Ref` each, the contents its arguments had then. An
operation in place makes a new node whose argument is the old one, so nodes never change and contents that nothing can
reach any more are forgotten: what is overwritten whole (a default initialisation before the model's own) costs nothing
later. Views share the cell. Evaluating a cell runs the nodes it depends on, in order, and frees each storage after its
last use; a storage that is still needed elsewhere is copied before it is written.

Random operations hold the generator's state from just before them. So each tensor can be evaluated alone, at any time
and in any order, to the same bits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .memory import byte_view

_KEPT_BYTES = 1 << 20
"""Tensors with data that a recorded operation reads are copied up to this size; larger ones are only watched."""


class Draw(NamedTuple):
    """Where a random operation begins in its generator's stream."""

    state: Tensor  # 1D, bytes
    device: torch.device
    given: bool  # whether the generator was an argument, not the device's default one


class Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Head(NamedTuple):
    """Contents of a storage: output ``slot`` of ``node``."""

    node: Node | None  # None: memory that nothing has written
    slot: int


@dataclass(frozen=True, slots=True)
class Ref:
    """A deferred tensor as it was when it was read."""

    head: Head
    nbytes: int  # of the storage
    home: torch.device
    geometry: Geometry


class Constant:
    """A tensor with data that a recorded operation reads.

    Args:
        tensor: Copied if it is small; otherwise only held, so that mapped files stay files.

    Raises:
        RuntimeError: It is on the meta device.
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise RuntimeError(
                f"a deferred initialisation reads a tensor of shape {list(tensor.shape)} on the meta device, which has "
                "no values: make it on another device, or under deferred(); a deferred model runs once "
                "it is partitioned"
            )
        small = tensor.nbytes <= _KEPT_BYTES
        self._tensor = tensor.detach().clone() if small else tensor  # a detached one would count versions by itself
        self._version = self._tensor._version
        # all of it, whatever the size: parameters would be put together from what differs between ranks
        content = hashlib.blake2b(byte_view(self._tensor.cpu().contiguous())).digest()
        self.identity = repr((tuple(tensor.shape), tensor.dtype, content))

    def value(self) -> Tensor:
        """Return the tensor, which must not have changed."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {list(self._tensor.shape)} was read by a deferred initialisation and changed in "
                "place since: leave it as it is until the model is sharded, or copy it first"
            )
        return self._tensor


class Node:
    """One recorded operation.

    Args:
        func: The operation.
        arguments: Its arguments and keyword arguments, flattened; tensors as :class:`Ref` or :class:`Constant`.
        spec: How to put them together again.
        written: Which of them it writes in place: output slots 0, 1, ...
        made: The tensors it makes, by their index among its outputs: the slots after these.
        draw: Of a random operation.
    """

    __slots__ = ("arguments", "digest", "draw", "func", "made", "spec", "written")

    def __init__(
        self,
        func: Any,
        arguments: Sequence[object],
        spec: pytree.TreeSpec,
        *,
        written: Sequence[int],
        made: Sequence[tuple[int, Geometry]],
        draw: Draw | None,
    ) -> None:
        self.func = func
        self.arguments = list(arguments)
        self.spec = spec
        self.written = tuple(written)
        self.made = tuple(made)
        self.draw = draw
        self.digest = self._digest()

    @property
    def refs(self) -> list[Ref]:
        """The deferred arguments."""
        return [argument for argument in self.arguments if isinstance(argument, Ref)]

    def run(self, tensors: dict[int, Tensor]) -> list[torch.UntypedStorage]:
        """Run the operation with ``tensors`` in place of the deferred arguments; return the storage of each slot."""
        leaves = [tensors.get(index, leaf) for index, leaf in enumerate(self.arguments)]
        leaves = [leaf.value() if isinstance(leaf, Constant) else leaf for leaf in leaves]
        if self.draw is None:
            out = self._call(leaves)
        elif self.draw.given:
            generator = torch.Generator(self.draw.device)
            generator.set_state(self.draw.state)
            out = self._call([generator if isinstance(leaf, torch.Generator) else leaf for leaf in leaves])
        else:
            generator = default_generator(self.draw.device)
            now = generator.get_state()
            generator.set_state(self.draw.state)
            try:
                out = self._call(leaves)
            finally:
                generator.set_state(now)
        storages = [tensors[index].untyped_storage() for index in self.written]
        held = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        outputs = pytree.tree_leaves(out)
        return storages + [_laid_out(outputs[index], geometry, held) for index, geometry in self.made]

    def _call(self, leaves: Sequence[object]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)

    def _digest(self) -> bytes:
        state = hashlib.blake2b(digest_size=16)
        state.update(f"{self.func}{self.spec}{self.written}".encode())
        for argument in self.arguments:
            state.update(_identity(argument))
        if self.draw is not None:
            state.update(byte_view(self.draw.state))
        return state.digest()


class Cell(torch.UntypedStorage):
    """Storage of deferred tensors; it has a size and no memory."""

    head: Head
    home: torch.device

    @property
    def digest(self) -> bytes:
        """What the contents depend on, as 16 bytes."""
        node, slot = self.head
        return hashlib.blake2b(b"%d" % slot + (b"" if node is None else node.digest), digest_size=16).digest()


def make_cell(nbytes: int, home: torch.device, head: Head) -> Cell:
    """Return a new cell; ``home`` is the device that the contents would be on."""
    cell = Cell(nbytes, device="meta")  # type: ignore[no-untyped-call]  # torch's constructor
    cell.head, cell.home = head, home
    return cell


def geometry_of(tensor: Tensor) -> Geometry:
    """Return how ``tensor`` lies in its storage."""
    return Geometry(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def tensor_over(storage: torch.UntypedStorage, geometry: Geometry) -> Tensor:
    """Return the tensor of that geometry in ``storage``."""
    empty = torch.empty(0, dtype=geometry.dtype, device=storage.device)
    return empty.set_(storage, geometry.offset, geometry.size, geometry.stride)


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that random operations on ``device`` draw from."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index: int | None = device.index
    generator: torch.Generator = module.default_generators[module.current_device() if index is None else index]
    return generator


def evaluate(head: Head, nbytes: int, home: torch.device) -> torch.UntypedStorage:
    """Compute the contents of a cell, see [Note: Tape]; the storage belongs to the caller.

    Memory: besides the result, what the longest-lived intermediate results take; for the usual initialisations nothing.
    """
    if head.node is None:
        return torch.UntypedStorage(nbytes, device=home)
    order = _in_order(head.node)
    uses = Counter(source for node in order for source in {ref.head for ref in node.refs})
    uses[head] += 1
    storages: dict[Head, torch.UntypedStorage] = {}
    for node in order:
        tensors = _arguments(node, storages, uses)
        for slot, storage in enumerate(node.run(tensors)):
            if uses[Head(node, slot)]:
                storages[Head(node, slot)] = storage
        del tensors
    return storages[head]


def _arguments(node: Node, storages: dict[Head, torch.UntypedStorage], uses: Counter[Head]) -> dict[int, Tensor]:
    """Return the deferred arguments of ``node`` as tensors that it may write where it does."""
    heads = {node.arguments[index].head for index in node.written}  # type: ignore[attr-defined]  # these are Refs
    taken: dict[Head, torch.UntypedStorage] = {}
    for source in {ref.head for ref in node.refs if ref.head.node is not None}:
        uses[source] -= 1
        taken[source] = storages[source] if uses[source] else storages.pop(source)
        if uses[source] and source in heads:
            taken[source] = taken[source].clone()
    tensors = {}
    for index, ref in enumerate(node.arguments):
        if isinstance(ref, Ref):
            fresh = ref.head.node is None
            storage = torch.UntypedStorage(ref.nbytes, device=ref.home) if fresh else taken[ref.head]
            tensors[index] = tensor_over(storage, ref.geometry)
    return tensors


def _in_order(last: Node) -> list[Node]:
    """Return the nodes that ``last`` depends on and itself, each after what it depends on."""
    order: list[Node] = []
    begun = {last}
    stack = [(last, iter(last.refs))]
    while stack:
        node, rest = stack[-1]
        for ref in rest:
            source = ref.head.node
            if source is not None and source not in begun:
                begun.add(source)
                stack.append((source, iter(source.refs)))
                break
        else:
            stack.pop()
            order.append(node)
    return order


def _laid_out(tensor: Tensor, geometry: Geometry, held: set[int]) -> torch.UntypedStorage:
    """Return a storage in which ``tensor`` lies as was recorded and which belongs to nobody else."""
    storage = tensor.untyped_storage()
    if geometry_of(tensor) == geometry and storage._cdata not in held:
        return storage
    numel = geometry.offset + 1 + sum((n - 1) * step for n, step in zip(geometry.size, geometry.stride, strict=True))
    storage = torch.UntypedStorage(numel * tensor.element_size(), device=tensor.device)
    tensor_over(storage, geometry).copy_(tensor)
    return storage


def _identity(argument: object) -> bytes:
    if isinstance(argument, Ref):
        node, slot = argument.head
        return (b"" if node is None else node.digest) + repr((slot, argument.nbytes, argument.geometry)).encode()
    if isinstance(argument, Constant):
        return argument.identity.encode()
    if isinstance(argument, torch.device):
        return argument.type.encode()  # its index differs from rank to rank
    return b"generator" if isinstance(argument, torch.Generator) else repr(argument).encode()
