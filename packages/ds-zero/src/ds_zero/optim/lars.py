"""LARS: momentum whose learning rate is scaled to the norms of each tensor and its gradient."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from .base import StatisticsOptimizer, Work


class Lars(StatisticsOptimizer):
    """LARS, layer-wise adaptive rate scaling.

    For a tensor w with gradient g: ``c = trust * |w| / (|g| + weight_decay * |w| + eps)``, 1 where either norm is 0;
    ``v = momentum * v + lr * c * (g + weight_decay * w)``; ``w -= v``. The norms are L2 over the whole tensor, in
    float64. Over shards, a step sends one message of a few bytes per tensor that a shard boundary cuts.

    Args:
        params: Parameters, or parameter groups. With ``adaptive`` false a group is stepped with c = 1, as is usual for
            biases and norms.
        lr: Global learning rate.
        momentum: Decay of the velocity.
        weight_decay: Times the parameter, added to the gradient.
        trust: How far to trust that a tensor changes its weights; eta in the paper.
        eps: Added to the denominator.
        adaptive: Whether to scale.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = Lars([weight], lr=1.0, trust=0.1)
        >>> weight.grad = torch.tensor([0.0, 2.0])
        >>> optimizer.step()  # by 0.1 * |w|
        >>> weight.detach()
        tensor([3.0000, 3.5000])

    Reference:
        You et al., Large Batch Training of Convolutional Networks, 2017, https://arxiv.org/abs/1708.03888.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust: float = 1e-3,
        eps: float = 0.0,
        adaptive: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "eps": eps,
            "adaptive": adaptive,
        }
        super().__init__(params, defaults)

    def update(self, work: list[Work]) -> None:
        """Step the parameters."""
        norms = self.norms(work, [each.param for each in work], [each.grad for each in work])
        for each, (weight, slope) in zip(work, norms, strict=True):
            group, state = each.group, each.state
            decay, rate = group["weight_decay"], float(group["lr"])
            if group["adaptive"] and weight > 0 and slope > 0:
                rate *= group["trust"] * weight / (slope + decay * weight + group["eps"])
            if not state:
                state["momentum_buffer"] = torch.zeros_like(each.param, memory_format=torch.preserve_format)
            direction = each.grad.add(each.param, alpha=decay)
            state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=rate)
            each.param.sub_(state["momentum_buffer"])
