"""AdamW whose gradients are exchanged in a few bits, with error feedback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.optimizer import ParamsT

from .adam import AdamMoments
from .link import Link, int4_codec

if TYPE_CHECKING:
    from ..codec import Codec


class CompressedAdam(AdamMoments):
    """AdamW on the compressed mean of the gradients, with error feedback at both hops.

    No warm-up: both moments are live from the first step on. ``m`` and ``v`` as in Adam, of the mean gradient as all
    ranks receive it, then ``p -= lr (m / (sqrt(v) + eps) + weight_decay p)`` with corrected moments. For N ranks and
    the default code, each rank sends and receives ``2 (N - 1) / N`` times 0.53 bytes per parameter and step.

    Memory: 16 bytes per parameter (moments, message, worker error), ``4 / N`` of server error, and three payloads. See
    [Note: Training with these optimizers] in ``base.py``.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to the update.
        bias_correction: Divide the moments by ``1 - beta**step``.
        codec: Codes the gradients; None: int4 in blocks of 64, with float16 scales.
        link: The ranks, and what holds for all messages.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = CompressedAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.9000, 2.1000])

    Reference:
        Kingma and Ba, Adam, 2015; Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes, 2019, https://arxiv.org/abs/1901.09847.
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
        codec: Codec | None = None,
        link: Link | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, codec or int4_codec(), link or Link())

    def update(self) -> bool:
        """Step the parameters; return False, and change nothing, if some rank's gradients are not finite."""
        step = self.count("step") + 1
        self._flat.gather(self._message)
        if not self._reducer.reduce(self._message):
            return False
        self.average(self._message)
        self.average_squares(self._message)
        self.move(self._buffers["exp_avg"], self.denominator(self._message, (step, step)))
        self.set_counts(step=step)
        return True
