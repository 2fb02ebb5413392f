"""1-bit LAMB: after a warm-up, ranks exchange codes of the momentum, and tensors' steps follow a fresh variance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..codecs import E8Codec
from .adam import WarmedUpMoments, checked_freeze_step
from .link import Link

if TYPE_CHECKING:
    from ..codec import Codec


class OneBitLamb(WarmedUpMoments):
    """1-bit LAMB.

    *Up to step* ``freeze_step``, LAMB with the mean gradient: ``u = m / (sqrt(v) + eps) + weight_decay p``, and for
    each tensor ``p -= lr c u`` with ``c = |p| / |u|`` kept within ``min_coeff ... max_coeff``, 1 where a norm is 0. Of
    those that are not, an average ``f = coeff_beta f + (1 - coeff_beta) c`` is kept.

    *Later* v stays. Each rank adds its own gradient to m; m, scaled so that all tensors have the same root mean square
    they had at the end of the warm-up, is replaced by its compressed mean. From two of those follows a gradient, and
    from it a fresh variance w. A tensor's factor is ``max((sqrt(v) + eps) / (sqrt(w) + eps))``, moved towards 1 by the
    share of weight decay in u, within ``factor_min ... factor_max``, and within ``factor_threshold`` of the last one;
    then ``p -= lr f factor u``.

    Messages as for :class:`OneBitAdam`. Memory: 24 bytes per parameter (three moments, message, worker error,
    denominator), ``4 / N`` of server error, and three payloads. See [Note: Training with these optimizers] in
    ``base.py``.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to Adam's direction.
        freeze_step: Last step of the warm-up.
        bias_correction: As for :class:`OneBitAdam`.
        max_coeff: Largest ratio of norms.
        min_coeff: Smallest ratio of norms.
        coeff_beta: Decay of the average of ratios.
        factor_max: Largest factor.
        factor_min: Smallest factor.
        factor_threshold: By what part a factor may differ from the last one.
        codec: Codes the momentum; None: as for :class:`OneBitAdam`.
        link: The ranks, and what holds for all messages.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = OneBitLamb([weight], lr=0.1, freeze_step=100, bias_correction=True)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()  # by 0.1 * |w| in the direction of the signs
        >>> weight.detach()
        tensor([2.6464, 4.3536])

    Reference:
        Li et al., 1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with LAMB's Convergence Speed,
        2021, https://arxiv.org/abs/2104.06069.
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "exp_avg_sq_fresh")
    numbers: ClassVar[Mapping[str, float]] = {"lamb_coeff_freeze": 0.0, "last_factor": 1.0, "scaling_coeff": 1.0}

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
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        codec: Codec | None = None,
        link: Link | None = None,
    ) -> None:
        self.freeze_step = checked_freeze_step(freeze_step)
        self.coeff_beta, self.factor_threshold = coeff_beta, factor_threshold
        self.coeff_range, self.factor_range = (min_coeff, max_coeff), (factor_min, factor_max)
        for name, (low, high) in {"coeff": self.coeff_range, "factor": self.factor_range}.items():
            if not 0 <= low <= high:
                raise ValueError(f"0 <= the smallest {name} <= the largest must hold; got {low} and {high}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, codec or E8Codec(), link or Link())

    # Warm-up #

    def warm_up(self, step: int) -> bool:
        """Step with the mean gradient."""
        self._flat.gather(self._message)
        if not self.exact_mean():
            return False
        self.average(self._message)
        self.average_squares(self._message)
        direction = self.denominator(self._message, (step, step)).reciprocal_().mul_(self._buffers["exp_avg"])
        self._add_decay(direction)
        params = self._norms([param.detach() for param in self._flat.params])
        for state, view, index, weight, length in self._tensors(direction, params, self._norms_of(direction)):
            ratio = 1.0
            if weight and length:
                ratio = _within(weight / length, self.coeff_range)
                average = state["lamb_coeff_freeze"]
                state["lamb_coeff_freeze"] = self.coeff_beta * average + (1 - self.coeff_beta) * ratio
            self._step_tensor(index, view, ratio)
        if step == self.freeze_step:
            self.fold_corrections((step, step))
            self._freeze()
        return True

    def _freeze(self) -> None:
        """Start the fresh variance, and find what makes the momenta alike."""
        self._buffers["exp_avg_sq_fresh"].copy_(self._buffers["exp_avg_sq"])
        norms = self._norms_of(self._buffers["exp_avg"])
        scales = momentum_scales(norms, [param.numel() for param in self._flat.params])
        for param, scale in zip(self._flat.params, scales, strict=True):
            self.state[param]["scaling_coeff"] = scale

    # Compressed #

    def compressed(self) -> bool:
        """Step with the compressed mean of the momentum."""
        mean, betas = self._buffers["exp_avg"], self.betas(0)
        self._flat.lerp(self._message, mean, [1 - beta for beta in betas])
        self._scale(inverse=False)
        if not self._reducer.reduce(self._message):
            return False
        self._scale(inverse=True)
        for part, beta in zip(self._flat.parts, betas, strict=True):
            # the gradient between the last mean and this one
            mean[part].mul_(-beta).add_(self._message[part]).div_(1 - beta)
        self.average_squares(mean, "exp_avg_sq_fresh")
        mean.copy_(self._message)
        frozen = self.frozen_denominator()
        factors = self._factors(frozen, self.denominator(self._message, name="exp_avg_sq_fresh"))
        direction = torch.div(mean, frozen, out=self._message)
        prelim = self._norms_of(direction)
        self._add_decay(direction)
        for state, view, index, factor, before, length in self._tensors(
            direction, factors, prelim, self._norms_of(direction)
        ):
            share = min(1.0, before / length) if length else 1.0
            state["last_factor"] = self._limited(factor * share + (1 - share), state["last_factor"])
            self._step_tensor(index, view, state["lamb_coeff_freeze"] * state["last_factor"])
        return True

    def _scale(self, *, inverse: bool) -> None:
        for param, view in zip(self._flat.params, self._flat.views(self._message), strict=True):
            scale = self.state[param]["scaling_coeff"]
            view.mul_(1 / scale if inverse else scale)

    def _factors(self, frozen: Tensor, fresh: Tensor) -> list[float]:
        """Largest quotient in each tensor; overwrites ``fresh``."""
        views = self._flat.views(torch.div(frozen, fresh, out=fresh))
        return _floats([view.max() if view.numel() else view.new_ones(()) for view in views])

    def _limited(self, factor: float, last: float) -> float:
        factor = _within(factor, self.factor_range)
        return _within(factor, (last * (1 - self.factor_threshold), last * (1 + self.factor_threshold)))

    # Both #

    def _tensors(self, direction: Tensor, *values: list[float]) -> Iterator[tuple[Any, ...]]:
        """Yield state, part of ``direction``, index, and of each of ``values`` the one of each tensor."""
        states = [self.state[param] for param in self._flat.params]
        return zip(states, self._flat.views(direction), range(len(states)), *values, strict=True)

    def _add_decay(self, direction: Tensor) -> None:
        for param, owner, view in zip(self._flat.params, self._flat.owners, self._flat.views(direction), strict=True):
            decay = self.param_groups[owner]["weight_decay"]
            if decay:
                view.add_(param, alpha=decay)

    def _step_tensor(self, index: int, direction: Tensor, ratio: float) -> None:
        param, group = self._flat.params[index], self.param_groups[self._flat.owners[index]]
        if param.requires_grad:
            param.add_(direction, alpha=-ratio * float(group["lr"]))

    def _norms_of(self, buffer: Tensor) -> list[float]:
        return self._norms(self._flat.views(buffer))

    def _norms(self, tensors: list[Tensor]) -> list[float]:
        return _floats([torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors])


def momentum_scales(norms: Sequence[float], numels: Sequence[int]) -> list[float]:
    """Return for each tensor what brings its momentum to the mean root mean square of all; 1 where it is zero.

    Args:
        norms: Of the momenta.
        numels: Elements of each; tensors without any do not count.

    Example:
        >>> momentum_scales([6.0, 1.0, 0.0], [4, 1, 0])
        [0.6666666666666666, 2.0, 1.0]
    """
    sizes = [norm / numel**0.5 for norm, numel in zip(norms, numels, strict=True) if numel]
    mean = sum(sizes) / max(1, len(sizes))
    return [mean / (norm / numel**0.5) if norm else 1.0 for norm, numel in zip(norms, numels, strict=True)]


def _floats(values: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack(values).tolist()  # one wait for the device
    return numbers


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
