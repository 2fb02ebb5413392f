"""LAMB: Adam whose step is scaled to the norm of each tensor."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from .base import StatisticsOptimizer, Work, adam_direction


class Lamb(StatisticsOptimizer):
    """LAMB, layer-wise adaptive moments, for large batches.

    For a tensor w with gradient g: Adam's direction ``r = m / (sqrt(v) + eps)`` with bias-corrected moments, then
    ``u = r + weight_decay * w`` and ``w -= lr * c * u``, where ``c = |w| / |u|`` is kept within ``coeff``,
    and 1 where either norm is 0. The norms are L2 over the whole tensor, in float64.

    Deviation from the paper: it bounds ``|w|`` by a function it leaves open; here, as in DeepSpeed, the ratio is
    bounded. Over shards, a step sends one message of a few bytes per tensor that a shard boundary cuts. Memory: two
    moments, and while it steps ``u``.

    Args:
        params: Parameters, or parameter groups. With ``adaptive`` false a group is stepped with c = 1, as is usual for
            biases and norms.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to Adam's direction.
        bias_correction: Divide the moments by ``1 - beta**step``.
        coeff: Smallest and largest ratio.
        adaptive: Whether to scale by the ratio.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = Lamb([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()  # by 0.1 * |w| in the direction of the signs
        >>> weight.detach()
        tensor([2.6464, 4.3536])

    Reference:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020,
        https://arxiv.org/abs/1904.00962.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        coeff: tuple[float, float] = (0.01, 10.0),
        adaptive: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "coeff": coeff,
            "adaptive": adaptive,
        }
        super().__init__(params, defaults)

    def update(self, work: list[Work]) -> None:
        """Step the parameters."""
        directions = []
        for each in work:
            group = each.group
            direction = adam_direction(each, group["betas"], group["eps"], bias_correction=group["bias_correction"])
            directions.append(direction.add_(each.param, alpha=group["weight_decay"]))
        norms = self.norms(work, [each.param for each in work], directions)
        for each, direction, (weight, length) in zip(work, directions, norms, strict=True):
            group = each.group
            ratio = 1.0
            if group["adaptive"] and weight > 0 and length > 0:
                ratio = min(max(weight / length, group["coeff"][0]), group["coeff"][1])
            each.param.add_(direction, alpha=-float(group["lr"]) * ratio)
