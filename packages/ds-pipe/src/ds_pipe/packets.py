"""Values of micro-batches as bytes: tensors in tuples, lists and dictionaries, beside numbers and texts.

[Note: Signature]
The *signature* of a value is what a receiver needs to put it together again: its structure, data types, shapes, what
requires a gradient, and whatever is no tensor. Tensors themselves lie one after the other in the *payload*, each at a
multiple of 64 bytes; where exactly follows from the signature and is worked out once, in a :class:`Layout`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ALIGN = 64
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NAMES = {value: name for name, value in _DTYPES.items()}


class Leaf(NamedTuple):
    """One part of a value."""

    dtype: str  # of a tensor; empty: no tensor
    shape: tuple[int, ...] = ()
    requires_grad: bool = False
    other: str = ""  # what is no tensor, as JSON: so 1, 1.0 and True differ

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 if it is none."""
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize if self.dtype else 0


class Signature(NamedTuple):
    """See [Note: Signature]."""

    structure: pytree.TreeSpec
    leaves: tuple[Leaf, ...]

    def dump(self) -> bytes:
        """Return bytes from which :meth:`load` makes it again."""
        return json.dumps([pytree.treespec_dumps(self.structure), self.leaves]).encode()

    @classmethod
    def load(cls, data: bytes) -> Signature:
        """Return what :meth:`dump` wrote."""
        structure, leaves = json.loads(data)
        made = tuple(Leaf(dtype, tuple(shape), *rest) for dtype, shape, *rest in leaves)
        return cls(pytree.treespec_loads(structure), made)


def signature_of(value: Any) -> tuple[Signature, list[Tensor]]:
    """Return the signature of ``value``, and its tensors.

    Raises:
        TypeError: Something in it is neither a tensor nor a JSON value.

    Example:
        >>> signature, tensors = signature_of({"x": torch.zeros(2, 3), "scale": 0.5})
        >>> len(tensors), [leaf.other for leaf in signature.leaves]
        (1, ['', '0.5'])
    """
    leaves, structure = pytree.tree_flatten(value)
    described, tensors = [], []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            described.append(Leaf(_NAMES[leaf.dtype], tuple(leaf.shape), leaf.requires_grad))
            tensors.append(leaf)
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append(Leaf("", other=json.dumps(leaf)))
        else:
            raise TypeError(
                f"between stages travel tensors, numbers, texts and None, in tuples, lists and dicts; got {type(leaf)}"
            )
    return Signature(structure, tuple(described)), tensors


class _Part(NamedTuple):
    """Where a tensor lies in the payload."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool


class Layout:
    """How values of one signature lie in a payload; made once for many of them.

    Example:
        >>> signature, tensors = signature_of([torch.arange(3), "a"])
        >>> layout = Layout(signature)
        >>> payload = torch.empty(layout.nbytes, dtype=torch.uint8)
        >>> layout.write(tensors, payload)
        >>> layout.nbytes, layout.read(payload)
        (64, [tensor([0, 1, 2]), 'a'])
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.nbytes = 0  # of the payload
        self._parts: list[_Part | None] = []  # None: no tensor
        self._others: list[Any] = []  # what is no tensor, in its place
        for leaf in signature.leaves:
            start, end = self.nbytes, self.nbytes + leaf.nbytes
            part = _Part(start, end, _DTYPES[leaf.dtype], leaf.shape, leaf.requires_grad) if leaf.dtype else None
            self._parts.append(part)
            self._others.append(None if leaf.dtype else json.loads(leaf.other))
            self.nbytes = -(-end // _ALIGN) * _ALIGN

    def write(self, tensors: Iterable[Tensor], payload: Tensor) -> None:
        """Copy ``tensors`` into ``payload`` (uint8), one after the other."""
        for part, tensor in zip(filter(None, self._parts), tensors, strict=True):
            payload[part.start : part.end].view(part.dtype).view(part.shape).copy_(tensor.detach())

    def read(self, payload: Tensor) -> Any:
        """Return the value whose tensors are views of ``payload`` (uint8)."""
        values = [
            other if part is None else _view(payload, part)
            for part, other in zip(self._parts, self._others, strict=True)
        ]
        return pytree.tree_unflatten(values, self.signature.structure)


def _view(payload: Tensor, part: _Part) -> Tensor:
    found = payload[part.start : part.end].view(part.dtype).view(part.shape)
    return found.requires_grad_() if part.requires_grad else found
