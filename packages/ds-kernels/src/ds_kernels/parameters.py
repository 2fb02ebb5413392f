"""Which parameters and gradients an optimizer can step, found out before anything is written.

[Note: Memory]
A step is elementwise over memory, so a parameter may have its dimensions in any order there (``channels_last``, a
transposed matrix), as long as it has no gaps and no overlaps: it is then one array, and so is its state, which has the
parameter's strides. A gradient with other strides is copied into that order first, once more through memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.checks import FLOATS

_STEPPED = (torch.float32, torch.bfloat16)


class Place(NamedTuple):
    """A parameter among those of an optimizer."""

    group: int
    number: int
    param: Tensor
    name: str | None

    def __str__(self) -> str:
        """Describe it for an error."""
        name = "" if self.name is None else f" {self.name!r}"
        return f"the parameter{name} (group {self.group}, index {self.number}, shape {tuple(self.param.shape)})"


def places(groups: Sequence[Mapping[str, Any]], first: int = 0) -> Iterator[Place]:
    """Yield the parameters of ``groups`` from group ``first`` on."""
    for number in range(first, len(groups)):
        names = groups[number].get("param_names")
        for index, param in enumerate(groups[number]["params"]):
            yield Place(number, index, param, None if names is None else names[index])


def is_final(param: Tensor) -> bool:
    """Return whether ``param`` is what will be stepped, as far as one can tell before the first step.

    Frozen parameters are not, nor are those in whose place partitioners put masters: float16 ones, and parameters
    without memory of their own, all strides 0.
    """
    if not param.requires_grad or param.dtype == torch.float16:
        return False
    return param.layout is not torch.strided or param.numel() < 2 or any(param.stride())


def check_parameter(place: Place) -> None:
    """Check that a parameter can be stepped.

    Raises:
        ValueError: If its data type or memory layout does not allow it.
    """
    param = place.param
    if param.dtype not in _STEPPED:
        raise ValueError(
            f"{place} must be torch.float32 or torch.bfloat16; got {param.dtype}; convert it with .float() or "
            ".bfloat16(), or leave it to another optimizer"
        )
    if param.layout is not torch.strided:
        raise ValueError(f"{place} must be a dense tensor; got {param.layout}; leave it to another optimizer")
    if not is_one_array(param):
        raise ValueError(
            f"{place} must be one array without gaps or overlaps; got strides {param.stride()}; make it of "
            ".detach().clone(memory_format=torch.contiguous_format)"
        )


def check_gradient(place: Place, grad: Tensor) -> None:
    """Check that a gradient can be read.

    Raises:
        ValueError: If its data type, memory layout or device does not allow it.
    """
    param = place.param
    if grad.dtype not in FLOATS:
        types = ", ".join(map(str, FLOATS))
        raise ValueError(f"the gradient of {place} must be one of {types}; got {grad.dtype}; convert it with .to()")
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {place} must be a dense tensor; got {grad.layout}; turn sparse gradients off "
            "(sparse=False), or pass it through .to_dense()"
        )
    if grad.device != param.device or grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {place} must have its shape and be on {param.device}; got shape {tuple(grad.shape)} on "
            f"{grad.device}"
        )


def is_one_array(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory, each its own place, in any order of dimensions.

    Example:
        >>> x = torch.empty(2, 3, 4)
        >>> is_one_array(x.permute(2, 0, 1)), is_one_array(x[:, :2])
        (True, False)
    """
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements of one array as they lie in memory; a 1D view.

    Example:
        >>> in_memory_order(torch.arange(4).view(2, 2).t())
        tensor([0, 1, 2, 3])
    """
    return tensor.as_strided((tensor.numel(),), (1,))


def same_order(a: Tensor, b: Tensor) -> bool:
    """Return whether the elements of ``a`` and ``b``, of one shape, lie in the same order."""
    return a.shape == b.shape and (
        (a.is_contiguous() and b.is_contiguous())
        or all(x == y for x, y, size in zip(a.stride(), b.stride(), a.shape) if size > 1)
    )


def ordered_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Return ``tensor`` with its elements in the order of ``param``; itself where they are."""
    if same_order(tensor, param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
