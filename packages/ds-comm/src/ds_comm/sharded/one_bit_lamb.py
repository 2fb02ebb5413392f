"""1-bit LAMB over partitioned state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..codecs import E8Codec
from ..optim.adam import checked_freeze_step, corrections, divide_by
from ..optim.one_bit_lamb import momentum_scales
from .base import Joined, ShardedOptimizer

if TYPE_CHECKING:
    from ds_core.exchange_protocols import Part, WholeFlat
    from ds_core.protocols import Collectives

    from ..codec import Codec

_NUMBERS = ("lamb_coeff_freeze", "last_factor", "scaling_coeff")


class Coefficients(NamedTuple):
    """Bounds and decays of a tensor's step size."""

    coeff: tuple[float, float] = (0.01, 10.0)
    """Smallest and largest ratio of norms, in the warm-up."""
    beta: float = 0.9
    """Decay of the average of ratios."""
    factor: tuple[float, float] = (0.5, 4.0)
    """Smallest and largest factor, later."""
    threshold: float = 0.1
    """By what part a factor may differ from the last one."""


class _Step(NamedTuple):
    """A part of a tensor and where it would go."""

    group: dict[str, Any]
    param: nn.Parameter
    direction: Tensor


class OneBitLamb(ShardedOptimizer):
    """1-bit LAMB, with the equations of :class:`ds_comm.optim.OneBitLamb`, over shards.

    Made by ds-zero for ds-core's configuration; it does not step by itself. See [Note: Sharded 1-bit optimizers]. The
    fresh variance is sharded, too: ranks measure their parts of tensors and exchange 24 bytes for each tensor, so
    norms are the plain optimizer's to rounding. What there is one number of for each tensor stands in the parameter
    group, in the order of names.

    Messages and memory: as for ``OneBitAdam``, ``4 / N`` bytes more for the fresh variance.

    Args:
        params: Parts of tensors, or parameter groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to Adam's direction.
        freeze_step: Last step of the warm-up.
        bias_correction: Divide the moments by ``1 - beta**step``, during the warm-up and once, for good, at its end.
        coefficients: Bounds and decays of step sizes.
        codec: Codes the momentum; None: as for :class:`OneBitAdam`.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> optimizer = OneBitLamb([nn.Parameter(torch.ones(3))], lr=0.1, freeze_step=100)
        >>> optimizer.param_groups[0]["update_kind"], optimizer.wants_own
        ('statistics', False)

    Reference:
        Li et al., 1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with LAMB's Convergence Speed,
        2021, https://arxiv.org/abs/2104.06069.
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "exp_avg_sq_fresh")

    def __init__(  # noqa: PLR0913 - settings of an optimizer
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int = 100_000,
        bias_correction: bool = False,
        coefficients: Coefficients | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.coefficients = coefficients or Coefficients()
        for name, (low, high) in (("coeff", self.coefficients.coeff), ("factor", self.coefficients.factor)):
            if not 0 <= low <= high:
                raise ValueError(f"0 <= the smallest {name} <= the largest must hold; got {low} and {high}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "update_kind": "statistics",
            **dict.fromkeys(_NUMBERS, ()),
        }
        super().__init__(params, defaults, codec or E8Codec(), checked_freeze_step(freeze_step))
        self._sums: Callable[..., list[list[float]]] | None = None
        self._comm: Collectives | None = None
        self._tensors: list[Part] = []  # of all buffers
        self._first: dict[int, int] = {}  # by key of a buffer: its first tensor
        self._places: dict[str, int] = {}  # by name: the place in the tuples of its group
        self._index: dict[nn.Parameter, int] = {}  # the tensor of which a parameter is a part

    def share_sums(self, sums: Callable[..., list[list[float]]]) -> None:
        """Take sums of squares over whole tensors from ``sums``."""
        self._sums = sums

    def join(self, comm: Collectives, flats: Sequence[WholeFlat]) -> None:
        """Exchange messages over ``comm`` from now on; called once, before the first step."""
        super().join(comm, flats)
        self._comm = comm
        for flat in flats:
            self._first[flat.key] = len(self._tensors)
            for start, param in flat.shards:
                own = next(i for i, part in enumerate(flat.parts) if part.start <= start < part.end)
                self._index[param] = len(self._tensors) + own
            self._tensors += flat.parts
        for index, group in enumerate(self.param_groups):
            names = sorted(part.name for part in self._tensors if part.group == index)
            self._places.update({name: place for place, name in enumerate(names)})
            for name, first in zip(_NUMBERS, (0.0, 1.0, 1.0), strict=True):
                group[name] = (first,) * len(names)

    # Warm-up #

    def warm_up(self, step: int) -> None:
        """Step the shards with the mean gradient."""
        work = list(self._directions(step))
        params = [each.param.detach() for each in work]
        norms = self._norms([each.param for each in work], params, [each.direction for each in work])
        ratios = {}
        for each, weight, length in zip(work, *norms, strict=True):
            ratio = _within(weight / length, self.coefficients.coeff) if weight and length else 0.0
            ratios[each.param] = [ratio]
            each.param.add_(each.direction, alpha=-float(each.group["lr"]) * (ratio or 1.0))
        beta, name = self.coefficients.beta, "lamb_coeff_freeze"
        of_all = zip(self._tensors, self._gathered(ratios).amax(0)[:, 0].tolist(), strict=True)
        kept = {part: beta * self._number(name, part) + (1 - beta) * ratio for part, ratio in of_all if ratio}
        self._set_numbers(name, kept)
        if step == self.freeze_step:
            self._freeze(step)

    def _directions(self, step: int) -> Iterator[_Step]:
        for group in self.param_groups:
            first, second = map(float, group["betas"])
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state_of(param)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(param.grad, 1 - first)
                v.mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                direction = divide_by(v.clone(), group, (step, step)).reciprocal_().mul_(m)
                yield _Step(group, param, direction.add_(param, alpha=group["weight_decay"]))

    def _freeze(self, step: int) -> None:
        """Start the fresh variance, and find what makes the momenta alike."""
        params, moments = [], []
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state_of(param)
                for name, correction in zip(("exp_avg", "exp_avg_sq"), corrections(group, (step, step)), strict=True):
                    state[name].div_(correction)
                state["exp_avg_sq_fresh"].copy_(state["exp_avg_sq"])
                params.append(param)
                moments.append(state["exp_avg"])
        (norms,) = self._norms(params, moments)
        of_all = self._gathered({param: [norm] for param, norm in zip(params, norms, strict=True)}).amax(0)[:, 0]
        scales = momentum_scales(of_all.tolist(), [part.end - part.start for part in self._tensors])
        self._set_numbers("scaling_coeff", dict(zip(self._tensors, scales, strict=True)))

    # Compressed #

    def derive(self, each: Joined) -> None:
        """Make the denominator of the frozen variance."""
        each.gather(self.state, "exp_avg_sq", each.denominator)
        for part in each.flat.parts:
            divide_by(each.denominator[part.start : part.end], self.param_groups[part.group], None)

    def load_message(self, each: Joined, message: Tensor, scale: float) -> None:
        """Write the momentum, with this rank's own gradient in it, into ``message``, all tensors alike in size."""
        if each.reducer.has_last:
            each.reducer.last(message)
            self._scale(each, message, inverse=True)
        else:
            each.gather(self.state, "exp_avg", message)
        gradient = each.flat.gradient().to(message.dtype).mul_(scale)
        for part in each.flat.parts:
            where = slice(part.start, part.end)
            message[where].lerp_(gradient[where], 1 - float(self.param_groups[part.group]["betas"][0]))
        self._scale(each, message, inverse=False)

    def take_mean(self, each: Joined, mean: Tensor) -> None:
        """Step all weights by the momentum that came back."""
        self._scale(each, mean, inverse=True)
        weights = each.flat.weights()
        measured = {}
        for start, param in each.flat.shards:
            where = slice(start, start + param.numel())
            measured[param] = self._measure(param, mean[where], each.denominator[where], weights[where])
        rows = self._gathered(measured, self._tensors_of(each), width=3)
        largest, squares = rows[:, :, 0].amax(0).tolist(), rows[:, :, 1:]
        factors: dict[Part, float] = {}
        for index, part in enumerate(each.flat.parts):
            group, where = self.param_groups[part.group], slice(part.start, part.end)
            before, length = (math.sqrt(math.fsum(column)) for column in squares[:, index].t().tolist())
            share = min(1.0, before / length) if length else 1.0
            factors[part] = self._limited(largest[index] * share + (1 - share), self._number("last_factor", part))
            direction = mean[where].div_(each.denominator[where]).add_(weights[where], alpha=group["weight_decay"])
            ratio = self._number("lamb_coeff_freeze", part) * factors[part]
            weights[where].add_(direction, alpha=-ratio * float(group["lr"]))
        self._set_numbers("last_factor", factors)
        each.flat.put_back()

    def _measure(self, param: nn.Parameter, mean: Tensor, denominator: Tensor, weights: Tensor) -> list[float]:
        """Update a shard's moments; return the largest quotient and two sums of squares, of its part of a tensor."""
        group, state = self.param_groups[self._tensors[self._index[param]].group], self.state[param]
        first, second = map(float, group["betas"])
        fresh = state["exp_avg_sq_fresh"]
        # the gradient between the last mean and this one
        gradient = state["exp_avg"].mul_(-first).add_(mean).div_(1 - first)
        fresh.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["exp_avg"].copy_(mean)
        direction = mean / denominator
        found = [(denominator / divide_by(fresh.clone(), group, None)).max().double(), _squares(direction)]
        found.append(_squares(direction.add_(weights, alpha=group["weight_decay"])))
        measured: list[float] = torch.stack(found).tolist()
        return measured

    def _scale(self, each: Joined, message: Tensor, *, inverse: bool) -> None:
        for part in each.flat.parts:
            scale = self._number("scaling_coeff", part)
            message[part.start : part.end].mul_(1 / scale if inverse else scale)

    def _limited(self, factor: float, last: float) -> float:
        threshold = self.coefficients.threshold
        factor = _within(factor, self.coefficients.factor)
        return _within(factor, (last * (1 - threshold), last * (1 + threshold)))

    # Numbers of tensors #

    def _tensors_of(self, each: Joined) -> slice:
        first = self._first[each.flat.key]
        return slice(first, first + len(each.flat.parts))

    def _number(self, name: str, part: Part) -> float:
        return float(self.param_groups[part.group][name][self._places[part.name]])

    def _set_numbers(self, name: str, values: Mapping[Part, float]) -> None:
        for index, group in enumerate(self.param_groups):
            numbers = list(group[name])
            for part, value in values.items():
                if part.group == index:
                    numbers[self._places[part.name]] = value
            group[name] = tuple(numbers)

    def _norms(self, params: Sequence[nn.Parameter], *values: Sequence[Tensor]) -> list[list[float]]:
        if self._sums is None:
            raise RuntimeError("parameters are parts of tensors here: share_sums() has to be called first")
        return [[math.sqrt(square) for square in squares] for squares in self._sums(params, list(values))]

    def _gathered(
        self, found: Mapping[nn.Parameter, list[float]], of: slice | None = None, *, width: int = 1
    ) -> Tensor:
        """Return ``[ranks, tensors, width]``, float64: what each rank found of its parts; 0 where it has none."""
        if self._comm is None:
            raise RuntimeError("this optimizer exchanges messages: join() has to be called first")
        of = of or slice(0, len(self._tensors))
        row = torch.zeros(of.stop - of.start, width, dtype=torch.float64)
        for param, values in found.items():
            row[self._index[param] - of.start] = torch.tensor(values, dtype=torch.float64)
        device = self._joined[0].flat.device
        rows: Tensor = self._comm.gather_rows(row.to(device).view(-1)).view(-1, *row.shape).cpu()
        return rows


def _squares(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
