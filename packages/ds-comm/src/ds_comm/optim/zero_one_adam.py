"""0/1 Adam: the variance learns ever more rarely, then not at all, and ranks exchange ever more rarely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..codecs import E8Codec
from .adam import AdamMoments
from .link import Link
from .rounds import RoundOptimizer

if TYPE_CHECKING:
    from ..codec import Codec


class ZeroOneAdam(AdamMoments, RoundOptimizer):
    """0/1 Adam.

    *Up to step* ``var_freeze_step``: where the step is a multiple of the variance interval, ranks exchange exact
    gradients and update both moments; at the other steps they exchange codes and update the first. After
    ``var_update_scaler`` updates of the variance the interval, 1 at first, doubles.

    *Later* each rank makes local steps ``u = m / (sqrt(v) + eps) + weight_decay p``, ``p -= lr u`` with its own
    gradients in m. At multiples of the local interval, with S the sum of ``lr`` over the round, ranks exchange codes of
    ``b = -(sum of lr u) (sqrt(v) + eps)``; then ``m = -b / S`` and ``p = anchor + b / (sqrt(v) + eps)``, with b the
    compressed mean. After ``local_step_scaler`` steps the interval, 1 at first, doubles, up to ``local_step_clipper``.

    Errors are set to zero between the phases. For N ranks an exchange takes ``2 (N - 1) / N`` times 0.133 bytes
    per parameter each way; with local steps, divided by the interval.

    Memory: 28 bytes per parameter (moments, message, worker error, denominator, sums, anchor), ``4 / N`` of server
    error, and three payloads.

    Deviations from DeepSpeed: parameters return to a copy of where the round began, not by adding back what was
    subtracted, so replicas keep the same bits; codes, errors and buffers as in :class:`OneBitAdam`. See
    [Note: Training with these optimizers] in ``base.py`` and [Note: Rounds] in ``rounds.py``.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to the update.
        var_freeze_step: Last step at which the variance may change.
        var_update_scaler: Updates of the variance between doublings of its interval.
        local_step_scaler: Steps between doublings of the local interval.
        local_step_clipper: Largest local interval.
        bias_correction: Divide each moment by ``1 - beta**updates``, until the variance is frozen and once, for good,
            then. DeepSpeed has the setting and ignores it.
        codec: Codes the messages; None: as for :class:`OneBitAdam`.
        link: The ranks, and what holds for all messages.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = ZeroOneAdam([weight], lr=0.1, bias_correction=True)
        >>> weight.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.9000, 2.1000])

    Reference:
        Lu et al., Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam, 2022,
        https://arxiv.org/abs/2202.06009.
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counters: ClassVar[Mapping[str, float]] = {
        "step": 0,
        "round_step": 0,  # local steps since the last exchange
        "lr_sum": 0.0,  # of those steps
        "var_updates": 0,  # of the variance, in all
        "var_counter": 0,  # since its interval changed
        "var_interval": 1,
        "local_step_counter": 0,  # since that interval changed
        "local_step_interval": 1,
    }

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        bias_correction: bool = False,
        codec: Codec | None = None,
        link: Link | None = None,
    ) -> None:
        self.var_freeze_step, self.var_update_scaler = var_freeze_step, var_update_scaler
        self.local_step_scaler, self.local_step_clipper = local_step_scaler, local_step_clipper
        for name in ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1; got {vars(self)[name]}")
        self._sums: Tensor | None = None  # of -lr u, in the round
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, codec or E8Codec(), link or Link())

    def update(self) -> bool:
        """Step the parameters; return False if some rank's gradients were not finite."""
        if self.count("step") < self.var_freeze_step:
            return self._learn()
        return self._stay()

    # While the variance learns #

    def _learn(self) -> bool:
        step, interval = self.count("step") + 1, self.count("var_interval")
        self._flat.gather(self._message)
        exact = step % interval == 0
        if not (self.exact_mean() if exact else self._reducer.reduce(self._message)):
            return False
        self.average(self._message)
        if exact:
            self.average_squares(self._message)
            self._count_variance(interval)
        steps = (step, self.count("var_updates"))
        self.move(self._buffers["exp_avg"], self.denominator(self._message, steps))
        if step == self.var_freeze_step:
            self.fold_corrections(steps)
            self._reducer.forget()  # later messages are in other units
        self.set_counts(step=step)
        return True

    def _count_variance(self, interval: int) -> None:
        counter = self.count("var_counter") + 1
        full = counter == self.var_update_scaler
        self.set_counts(
            var_updates=self.count("var_updates") + 1,
            var_counter=0 if full else counter,
            var_interval=2 * interval if full else interval,
        )

    # Rounds of local steps #

    def _stay(self) -> bool:
        step, interval = self.count("step") + 1, self.count("local_step_interval")
        self.anchor()
        self._flat.lerp(self._message, self._buffers["exp_avg"], [1 - beta for beta in self.betas(0)])
        if self.sound(self._message):
            self._buffers["exp_avg"].copy_(self._message)
            self._local_step()
        for group in self.param_groups:
            group["lr_sum"] += float(group["lr"])
        counter = self.count("local_step_counter") + 1
        full = counter == self.local_step_scaler
        self.set_counts(
            step=step,
            round_step=self.count("round_step") + 1,
            local_step_counter=0 if full else counter,
            local_step_interval=min(self.local_step_clipper, 2 * interval) if full else interval,
        )
        return self.end_round() if step % interval == 0 else True

    def _local_step(self) -> None:
        """Step by this rank's momentum; the message is scratch."""
        tensors = zip(
            self._flat.params,
            self._flat.owners,
            *map(self._flat.views, (self._buffers["exp_avg"], self.frozen_denominator(), self._message, self._moved())),
            strict=True,
        )
        for param, owner, mean, denominator, update, moved in tensors:
            group = self.param_groups[owner]
            if param.requires_grad:
                update.copy_(mean).div_(denominator).add_(param, alpha=group["weight_decay"])
                param.add_(update, alpha=-float(group["lr"]))
                moved.add_(update, alpha=-float(group["lr"]))

    def end_round(self) -> bool:
        """Exchange what the round added; return False if all ranks went back to where it began."""
        anchor, moved, denominator = self.anchor(), self._moved(), self.frozen_denominator()
        self._message.copy_(moved).mul_(denominator)
        moved.zero_()
        sums = [float(group["lr_sum"]) for group in self.param_groups]
        self.set_counts(lr_sum=0.0)
        if not self.exchange(anchor):
            self._buffers["exp_avg"].zero_()  # each rank has its own
            return False
        for part, total in zip(self._flat.parts, sums, strict=True):
            if total:  # otherwise nothing moved, and each rank goes on with its momentum
                self._buffers["exp_avg"][part].copy_(self._message[part]).div_(-total)
        self._flat.place_params(self._message.div_(denominator).add_(anchor))
        return True

    def _moved(self) -> Tensor:
        if self._sums is None:
            self._sums = self._flat.new()
        return self._sums
