"""0/1 Adam over partitioned state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..codecs import E8Codec
from ..optim.adam import corrections, divide_by
from .base import Joined, ShardedOptimizer
from .one_bit_adam import move

if TYPE_CHECKING:
    from ds_core.exchange_protocols import WholeFlat
    from ds_core.protocols import Collectives

    from ..codec import Codec


class Intervals(NamedTuple):
    """How often ranks exchange."""

    var_freeze_step: int = 100_000
    """Last step at which the variance may change."""
    var_update_scaler: int = 16
    """Updates of the variance between doublings of its interval."""
    local_step_scaler: int = 32_678
    """Steps between doublings of the local interval."""
    local_step_clipper: int = 16
    """Largest local interval."""


class _Local(NamedTuple):
    """What a rank holds of a buffer besides its weights; 1D, whole."""

    momentum: Tensor
    anchor: Tensor  # weights at the beginning of the round
    moved: Tensor  # how far the round has gone


class ZeroOneAdam(ShardedOptimizer):
    """0/1 Adam, with the equations of :class:`ds_comm.optim.ZeroOneAdam`, over shards.

    Made by ds-zero for ds-core's configuration; it does not step by itself. See [Note: Sharded 1-bit optimizers]. Steps
    that exchange exact gradients are the partitioner's, on shards; the next step of another kind gathers both moments.

    Within a round of local steps weights differ between ranks; state is saved, loaded and written between rounds only,
    at whose end every rank has the same weights, moments and bits. A gradient that is not finite on some rank leaves
    out that step on all.

    Messages: as for the plain optimizer, and 8 bytes for each buffer and step. Memory per parameter besides weights and
    gradients: ``12 / N`` bytes of moments and server errors, 20 of worker error, momentum, denominator, anchor and
    sums, two payloads; with a lower compute data type 4 more of exact weights.

    Args:
        params: Shards, or parameter groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to the update.
        bias_correction: Divide each moment by ``1 - beta**updates``, until the variance is frozen and once, for good,
            then.
        intervals: How often ranks exchange.
        codec: Codes the messages; None: as for :class:`OneBitAdam`.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = ZeroOneAdam([weight], lr=0.1, bias_correction=True)
        >>> weight.grad = torch.tensor([0.5, -0.5])
        >>> optimizer.step()
        >>> weight.detach(), optimizer.wants_own
        (tensor([0.9000, 2.1000]), False)

    Reference:
        Lu et al., Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam, 2022,
        https://arxiv.org/abs/2202.06009.
    """

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

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = False,
        intervals: Intervals | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.intervals = intervals or Intervals()
        for name, value in self.intervals._asdict().items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "update_kind": "elementwise",
        }
        super().__init__(params, defaults, codec or E8Codec(), freeze_step=self.intervals.var_freeze_step)
        self._local: dict[int, _Local] = {}  # by key

    # Role ExchangingOptimizer #

    def join(self, comm: Collectives, flats: Sequence[WholeFlat]) -> None:
        """Exchange messages over ``comm`` from now on; called once, before the first step."""
        super().join(comm, flats)
        for flat in flats:
            self._local[flat.key] = _Local(*(torch.zeros(flat.numel, device=flat.device) for _ in range(3)))

    @property
    def wants_own(self) -> bool:
        """Whether the next step is :meth:`step_own`, not ``step``."""
        step = self.count("step") + 1
        return step > self.freeze_step or step % self.count("var_interval") != 0

    @torch.no_grad()
    def step_own(self, scale: float) -> None:
        """Step once with each rank's own gradient times ``scale``. All ranks call it; gradients are finite."""
        step = self.count("step") + 1
        if step <= self.freeze_step:
            super().step_own(scale)
            if step == self.freeze_step:
                self._freeze()
        else:
            self._local_step(step, scale)

    @torch.no_grad()
    def synchronize(self) -> None:
        """End the round, if one is under way. All ranks call it."""
        if self.count("round_step"):
            self._end_round()

    def forget_whole(self) -> None:
        """Derive anew what was derived from shards of the state: they were written from outside."""
        self._check_between_rounds()
        super().forget_whole()

    def owed(self) -> dict[int, Tensor]:
        """Return by key this rank's shard (1D, float32) of what all ranks have yet to send. All ranks call it."""
        self._check_between_rounds()
        return super().owed()

    @property
    def whole_bytes(self) -> int:
        """Bytes held besides the tensors of ``state``."""
        return super().whole_bytes + sum(tensor.nbytes for local in self._local.values() for tensor in local)

    # While the variance learns #

    def warm_up(self, step: int) -> None:
        """Step the shards with the mean gradient, and both moments."""
        updates = self.count("var_updates") + 1
        for group in self.param_groups:
            first, second = map(float, group["betas"])
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state_of(param)
                    m, v = state["exp_avg"], state["exp_avg_sq"]
                    m.lerp_(param.grad, 1 - first)
                    v.mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                    move(param, m, divide_by(v.clone(), group, (step, updates)), group)
        counter, interval = self.count("var_counter") + 1, self.count("var_interval")
        full = counter == self.intervals.var_update_scaler
        self.set_counts(
            var_updates=updates,
            var_counter=0 if full else counter,
            var_interval=2 * interval if full else interval,
        )
        self.forget_whole()
        if step == self.freeze_step:
            self._freeze()

    def derive(self, each: Joined) -> None:
        """Gather the moments; a frozen variance becomes the denominator."""
        each.gather(self.state, "exp_avg", self._local[each.flat.key].momentum)
        each.gather(self.state, "exp_avg_sq", each.denominator)
        self._local[each.flat.key].moved.zero_()
        if self.count("step") >= self.freeze_step:
            for part in each.flat.parts:
                divide_by(each.denominator[part.start : part.end], self.param_groups[part.group], None)

    def load_message(self, each: Joined, message: Tensor, scale: float) -> None:
        """Write this rank's own gradient into ``message``."""
        message.copy_(each.flat.gradient()).mul_(scale)

    def take_mean(self, each: Joined, mean: Tensor) -> None:
        """Step all weights by the momentum with the gradient that came back."""
        momentum, weights = self._local[each.flat.key].momentum, each.flat.weights()
        steps = (self.count("step") + 1, self.count("var_updates"))
        for part in each.flat.parts:
            group, where = self.param_groups[part.group], slice(part.start, part.end)
            momentum[where].lerp_(mean[where], 1 - float(group["betas"][0]))
            denominator = divide_by(mean[where].copy_(each.denominator[where]), group, steps)
            move(weights[where], momentum[where], denominator, group)
        each.flat.put_back()
        each.scatter(self.state, "exp_avg", momentum)

    def _freeze(self) -> None:
        """Correct the moments for good; later messages are in other units, so what is owed is dropped."""
        steps = (self.freeze_step, self.count("var_updates"))
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state_of(param)
                for name, correction in zip(("exp_avg", "exp_avg_sq"), corrections(group, steps), strict=True):
                    state[name].div_(correction)
        super().forget_whole()
        self.load_owed({})

    # Rounds of local steps #

    def _local_step(self, step: int, scale: float) -> None:
        for each in self._joined:
            self.ensure_derived(each)
            momentum, anchor, moved = self._local[each.flat.key]
            weights, message = each.flat.weights(), self._message[: each.flat.numel]
            if not self.count("round_step"):
                anchor.copy_(weights)
            gradient = each.flat.gradient().to(message.dtype).mul_(scale)
            for part in each.flat.parts:
                group, where = self.param_groups[part.group], slice(part.start, part.end)
                momentum[where].lerp_(gradient[where], 1 - float(group["betas"][0]))
                update = message[where].copy_(momentum[where]).div_(each.denominator[where])
                update.add_(weights[where], alpha=group["weight_decay"])
                weights[where].add_(update, alpha=-float(group["lr"]))
                moved[where].add_(update, alpha=-float(group["lr"]))
            each.flat.put_back()
        for group in self.param_groups:
            group["lr_sum"] += float(group["lr"])
        counter, interval = self.count("local_step_counter") + 1, self.count("local_step_interval")
        full = counter == self.intervals.local_step_scaler
        self.set_counts(
            step=step,
            round_step=self.count("round_step") + 1,
            local_step_counter=0 if full else counter,
            local_step_interval=min(self.intervals.local_step_clipper, 2 * interval) if full else interval,
        )
        if step % interval == 0:
            self._end_round()

    def _end_round(self) -> None:
        """Exchange what the round added, and go on from a common place."""

        def load(each: Joined, message: Tensor) -> None:
            moved = self._local[each.flat.key].moved
            for part in each.flat.parts:
                where = slice(part.start, part.end)
                torch.mul(moved[where], each.denominator[where], out=message[where])
            moved.zero_()

        def take(each: Joined, mean: Tensor) -> None:
            momentum, anchor, _ = self._local[each.flat.key]
            weights = each.flat.weights()
            for part in each.flat.parts:
                where, total = slice(part.start, part.end), float(self.param_groups[part.group]["lr_sum"])
                if total:  # otherwise nothing moved, and each rank goes on with its momentum
                    momentum[where].copy_(mean[where]).div_(-total)
                torch.add(mean[where].div_(each.denominator[where]), anchor[where], out=weights[where])
            each.flat.put_back()
            each.scatter(self.state, "exp_avg", momentum)

        self.exchange(load, take)
        self.set_counts(round_step=0, lr_sum=0.0)

    def _check_between_rounds(self) -> None:
        if self.count("round_step"):
            raise RuntimeError(
                "weights and state are saved, loaded and written between rounds of local steps, when they are the "
                f"same on all ranks; got a call after {self.count('round_step')} steps of a round: call synchronize() "
                "of the optimizer (engine.optimizer) on all ranks first"
            )
