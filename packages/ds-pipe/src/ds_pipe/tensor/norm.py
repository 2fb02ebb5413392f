"""The norm of gradients of a model that is split, for a training loop of one's own."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from .splitting import Split


def grad_norm(module: nn.Module, made: Split, *, group: dist.ProcessGroup | None = None) -> float:
    """Return the L2 norm of the gradients of the whole model, the same on all ranks; all ranks call it.

    Of each block the square is summed in float64; the sums over blocks are exact, so the norm has the same bits on any
    number of ranks. Communication: 8 bytes for each parameter of a rank.

    Args:
        module: It.
        made: What :func:`split` returned for it.
        group: The ranks it was split over.

    Example:
        >>> from .plan import Plan, Rule
        >>> from .splitting import split
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> made = split(model, Plan(rules=(Rule(patterns=("0",)),)), num_blocks=2)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> grad_norm(model, made)
        2.0
    """
    rank = 0 if group is None else dist.get_rank(group)
    squares = [
        param.grad.double().square().sum().reshape(1)
        for param in module.parameters()
        if param.grad is not None and (param in made.blocks or rank == 0)
    ]
    own = torch.cat(squares) if squares else torch.zeros(1, dtype=torch.float64)
    if group is None:
        return math.sqrt(math.fsum(own.tolist()))
    length = torch.tensor([own.numel()], device=own.device)
    dist.all_reduce(length, dist.ReduceOp.MAX, group=group)
    padded = torch.cat([own, own.new_zeros(int(length) - own.numel())])
    rows = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, padded, group=group)
    return math.sqrt(math.fsum(torch.cat(rows).tolist()))
