"""1-bit Adam over partitioned state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..codecs import E8Codec
from ..optim.adam import checked_freeze_step, corrections, divide_by
from .base import Joined, ShardedOptimizer

if TYPE_CHECKING:
    from ..codec import Codec


class OneBitAdam(ShardedOptimizer):
    """1-bit Adam, with the equations of :class:`ds_comm.optim.OneBitAdam`, over shards.

    Made by ds-zero for ds-core's configuration; it does not step by itself. See [Note: Sharded 1-bit optimizers].

    Messages, each way, for N ranks: as at ZeRO stages 1 and 2 in the warm-up, then ``2 (N - 1) / N`` times 0.133 bytes
    per parameter with the default code. Memory per parameter besides weights and gradients:
    ``12 / N`` bytes of moments and server errors, 8 of worker error and denominator, two payloads; with a lower compute
    data type 4 more of exact weights; and 4 for each element of the largest unit.

    Args:
        params: Shards, or parameter groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to the update.
        freeze_step: Last step of the warm-up.
        bias_correction: Divide the moments by ``1 - beta**step``, during the warm-up and once, for good, at its end.
        codec: Codes the momentum; None: :class:`~..codecs.E8Codec`, 1 bit with an exact zero.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = OneBitAdam([weight], lr=0.1, freeze_step=100, bias_correction=True)
        >>> weight.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> weight.detach(), optimizer.wants_own
        (tensor([0.9000, 2.1000]), False)

    Reference:
        Tang et al., 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed, 2021,
        https://arxiv.org/abs/2102.02888.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int = 100_000,
        bias_correction: bool = False,
        codec: Codec | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "update_kind": "elementwise",
        }
        super().__init__(params, defaults, codec or E8Codec(), checked_freeze_step(freeze_step))

    def warm_up(self, step: int) -> None:
        """Step the shards with the mean gradient."""
        for group in self.param_groups:
            first, second = map(float, group["betas"])
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state_of(param)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(param.grad, 1 - first)
                v.mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                move(param, m, divide_by(v.clone(), group, (step, step)), group)
                if step == self.freeze_step:
                    for moment, correction in zip((m, v), corrections(group, (step, step)), strict=True):
                        moment.div_(correction)

    def derive(self, each: Joined) -> None:
        """Make the denominator of the frozen variance."""
        each.gather(self.state, "exp_avg_sq", each.denominator)
        for part in each.flat.parts:
            divide_by(each.denominator[part.start : part.end], self.param_groups[part.group], None)

    def load_message(self, each: Joined, message: Tensor, scale: float) -> None:
        """Write the momentum, with this rank's own gradient in it, into ``message``."""
        if each.reducer.has_last:
            each.reducer.last(message)
        else:
            each.gather(self.state, "exp_avg", message)
        gradient = each.flat.gradient().to(message.dtype).mul_(scale)
        for part in each.flat.parts:
            where = slice(part.start, part.end)
            message[where].lerp_(gradient[where], 1 - float(self.param_groups[part.group]["betas"][0]))

    def take_mean(self, each: Joined, mean: Tensor) -> None:
        """Step all weights by the momentum that came back."""
        each.scatter(self.state, "exp_avg", mean)
        weights = each.flat.weights()
        for part in each.flat.parts:
            where = slice(part.start, part.end)
            move(weights[where], mean[where], each.denominator[where], self.param_groups[part.group])
        each.flat.put_back()


def move(weights: Tensor, momentum: Tensor, denominator: Tensor, group: dict[str, Any]) -> None:
    """Subtract ``lr * (momentum / denominator + weight_decay * w)``."""
    lr = float(group["lr"])
    if group["weight_decay"]:
        weights.mul_(1 - lr * group["weight_decay"])
    weights.addcdiv_(momentum, denominator, value=-lr)
