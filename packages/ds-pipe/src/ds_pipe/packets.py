"""Values of micro-batches as bytes: tensors in tuples, lists and dictionaries, beside numbers and texts.

[Note: Signature]
The *signature* of a value is what a receiver needs to put it together again: its structure, data types, shapes, what
requires a gradient, and whatever is no tensor. Tensors themselves lie one after the other in the *payload*, each at a
multiple of 64 bytes.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ALIGN = 64
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Leaf(NamedTuple):
    """One part of a value."""

    dtype: str  # of a tensor; empty: no tensor
    shape: tuple[int, ...] = ()
    requires_grad: bool = False
    other: Any = None  # what is no tensor: a JSON value

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 if it is none."""
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize if self.dtype else 0

    @property
    def room(self) -> int:
        """Bytes in the payload."""
        return -(-self.nbytes // _ALIGN) * _ALIGN


class Signature(NamedTuple):
    """See [Note: Signature]."""

    structure: str
    leaves: tuple[Leaf, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(leaf.room for leaf in self.leaves)

    def dump(self) -> bytes:
        """Return bytes from which :meth:`load` makes it again."""
        return json.dumps(self).encode()

    @classmethod
    def load(cls, data: bytes) -> Signature:
        """Return what :meth:`dump` wrote."""
        structure, leaves = json.loads(data)
        return cls(structure, tuple(Leaf(dtype, tuple(shape), *rest) for dtype, shape, *rest in leaves))


NOTHING = Signature("", ())
"""Of no value at all: nothing has been agreed on yet."""


def signature_of(value: Any) -> tuple[Signature, list[Tensor]]:
    """Return the signature of ``value``, and its tensors.

    Raises:
        TypeError: Something in it is neither a tensor nor a JSON value.

    Example:
        >>> signature, tensors = signature_of({"x": torch.zeros(2, 3), "scale": 0.5})
        >>> signature.nbytes, len(tensors), [leaf.other for leaf in signature.leaves]
        (64, 1, [None, 0.5])
    """
    leaves, structure = pytree.tree_flatten(value)
    described, tensors = [], []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            name = str(leaf.dtype).removeprefix("torch.")
            described.append(Leaf(name, tuple(leaf.shape), leaf.requires_grad))
            tensors.append(leaf)
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append(Leaf("", other=leaf))
        else:
            raise TypeError(
                f"between stages travel tensors, numbers, texts and None, in tuples, lists and dicts; got {type(leaf)}"
            )
    return Signature(pytree.treespec_dumps(structure), tuple(described)), tensors


def write(tensors: list[Tensor], payload: Tensor) -> None:
    """Copy ``tensors`` into ``payload`` (uint8), one after the other."""
    offset = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes:
            payload[offset : offset + nbytes].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        offset += -(-nbytes // _ALIGN) * _ALIGN


def read(signature: Signature, payload: Tensor) -> Any:
    """Return the value whose tensors are views of ``payload`` (uint8)."""
    values: list[Any] = []
    offset = 0
    for leaf in signature.leaves:
        if not leaf.dtype:
            values.append(leaf.other)
            continue
        part = payload[offset : offset + leaf.nbytes].view(_DTYPES[leaf.dtype]).view(leaf.shape)
        values.append(part.requires_grad_(leaf.requires_grad))
        offset += leaf.room
    return pytree.tree_unflatten(values, pytree.treespec_loads(signature.structure))
