"""1-bit Adam: after a warm-up, ranks exchange codes of the momentum, and the variance stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.optimizer import ParamsT

from ..codecs import E8Codec
from .adam import WarmedUpMoments, checked_freeze_step
from .link import Link

if TYPE_CHECKING:
    from ..codec import Codec


class OneBitAdam(WarmedUpMoments):
    """1-bit Adam.

    With g the mean gradient over ranks, up to step ``freeze_step``: ``m = beta1 m + (1 - beta1) g`` and ``v = beta2 v +
    (1 - beta2) g^2``. Later v stays, and each rank adds its own gradient to m, of which all ranks take the compressed
    mean with error feedback. Always ``p -= lr (m / (sqrt(v) + eps) + weight_decay p)``.

    The warm-up, recommended for 15 to 25 % of all steps, exchanges 8 bytes per parameter, or 4 in bfloat16; for N ranks
    ``2 (N - 1) / N``, each way, of 4 or 2. Afterwards it is that multiple of 0.133 bytes: 1 bit, and a scale for every
    512 elements; at most 0.27 for any N, from 65536 parameters for each rank on. (``ternary`` takes 0.22, 0.44 for many
    ranks, and loses less.)

    Memory: 20 bytes per parameter (moments, message, worker error, denominator), ``4 / N`` of server error, and three
    payloads.

    Deviations from DeepSpeed: a code with an exact zero by default, so that parameters whose gradients are always zero
    need no mask (``sign`` would move them, by multiples of ``lr / eps``); errors in checkpoints; one buffer of all
    parameters, two collectives a step. See [Note: Training with these optimizers] in ``base.py``.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to the update.
        freeze_step: Last step of the warm-up.
        bias_correction: Divide the moments by ``1 - beta**step``, during the warm-up and once, for good, at its end.
            DeepSpeed has the setting and ignores it.
        codec: Codes the momentum; None: :class:`~..codecs.E8Codec`, 1 bit with an exact zero.
        link: The ranks, and what holds for all messages.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = OneBitAdam([weight], lr=0.1, freeze_step=100, bias_correction=True)
        >>> weight.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.9000, 2.1000])

    Reference:
        Tang et al., 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed, 2021,
        https://arxiv.org/abs/2102.02888.
    """

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
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
        link: Link | None = None,
    ) -> None:
        self.freeze_step = checked_freeze_step(freeze_step)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, codec or E8Codec(), link or Link())

    def warm_up(self, step: int) -> bool:
        """Step with the mean gradient."""
        self._flat.gather(self._message)
        if not self.exact_mean():
            return False
        self.average(self._message)
        self.average_squares(self._message)
        self.move(self._buffers["exp_avg"], self.denominator(self._message, (step, step)))
        if step == self.freeze_step:
            self.fold_corrections((step, step))
        return True

    def compressed(self) -> bool:
        """Step with the compressed mean of the momentum."""
        mean = self._buffers["exp_avg"]
        self._flat.lerp(self._message, mean, [1 - beta for beta in self.betas(0)])
        if not self._reducer.reduce(self._message, mean):
            return False
        self.move(mean, self.frozen_denominator())
        return True
