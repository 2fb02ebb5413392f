"""What happens at the borders of a split region, forward and backward.

[Note: Borders]
=================  =====================================  ==========================================
function           forward                                backward
=================  =====================================  ==========================================
``copies`` (f)     one copy of the input for each block   sum over blocks, along the tree
``total`` (g)      sum over blocks, along the tree        the gradient, for each block
``pieces``         this rank's blocks of the last dim     put together
``together``       this rank's blocks, put together       cut into blocks
``gathered``       all ranks' last dims, put together     this rank's part
=================  =====================================  ==========================================

f and g are the conjugate operators of Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models
Using Model Parallelism", 2019, https://arxiv.org/abs/1909.08053. Blocks are contiguous in memory in both directions: a
product with a matrix may have other bits where its operands have other strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sums import Ranks, tree_sum


def copies(value: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """Return ``value`` once for each of this rank's blocks.

    The gradient costs one sum over the ranks of as many elements as ``value`` has.

    Example:
        >>> value = torch.ones(2, requires_grad=True)
        >>> first, second = copies(value, 2, Ranks())
        >>> (first + 2 * second).sum().backward()
        >>> value.grad
        tensor([3., 3.])
    """
    if count == ranks.size == 1:
        return (value,)
    found: tuple[Tensor, ...] = _Copies.apply(value, count, ranks)  # type: ignore[no-untyped-call]  # torch's
    return found


def total(parts: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Return the sum of the blocks of all ranks; costs one sum over the ranks.

    Example:
        >>> total([torch.ones(2), torch.ones(2)], Ranks())
        tensor([2., 2.])
    """
    if len(parts) == ranks.size == 1:
        return parts[0]
    found: Tensor = _Total.apply(ranks, *parts)  # type: ignore[no-untyped-call]  # torch's
    return found


def pieces(value: Tensor, count: int) -> tuple[Tensor, ...]:
    """Cut the last dimension into ``count`` equal blocks.

    Example:
        >>> [piece.tolist() for piece in pieces(torch.tensor([[1, 2, 3, 4]]), 2)]
        [[[1, 2]], [[3, 4]]]
    """
    if count == 1:
        return (value.contiguous(),)
    found: tuple[Tensor, ...] = _Pieces.apply(value, count)  # type: ignore[no-untyped-call]  # torch's
    return found


def together(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Put blocks together in the last dimension, section by section.

    Args:
        parts: Of one shape.
        sizes: Of a block's sections.

    Example:
        >>> together([torch.tensor([1, 5]), torch.tensor([2, 6])], [1, 1])
        tensor([1, 2, 5, 6])
    """
    if len(parts) == 1:
        return parts[0]
    found: Tensor = _Together.apply(tuple(sizes), *parts)  # type: ignore[no-untyped-call]  # torch's
    return found


def gathered(value: Tensor, ranks: Ranks) -> Tensor:
    """Return the last dimensions of all ranks, one behind the other; what follows is computed by all of them alike."""
    if ranks.size == 1:
        return value
    found: Tensor = _Gathered.apply(value, ranks)  # type: ignore[no-untyped-call]  # torch's
    return found


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(value.view_as(value) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum(tree_sum(grads)), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *parts: Tensor) -> Tensor:
        ctx.count = len(parts)
        return ranks.sum(tree_sum(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grads * ctx.count)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int) -> tuple[Tensor, ...]:
        del ctx
        return tuple(piece.contiguous() for piece in value.chunk(count, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return torch.cat(grads, -1), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], *parts: Tensor) -> Tensor:
        ctx.sizes, ctx.count = sizes, len(parts)
        split = [part.split(sizes, -1) for part in parts]
        return torch.cat([each[section] for section in range(len(sizes)) for each in split], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        sections = grad.split([size * ctx.count for size in ctx.sizes], -1)
        split = [section.chunk(ctx.count, -1) for section in sections]
        return None, *(torch.cat([each[block] for each in split], -1) for block in range(ctx.count))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.rank, ctx.width = ranks.rank, value.shape[-1]
        return torch.cat(ranks.gather(value), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad.narrow(-1, ctx.rank * ctx.width, ctx.width).contiguous(), None
