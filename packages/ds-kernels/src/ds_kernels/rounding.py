"""Stochastic rounding of what an optimizer stores in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticRounding:
    """Round bfloat16 parameters and moments up or down, with the odds that leave the expectation as it is.

    Rounding to nearest loses every step smaller than half a unit in the last place, 1/512 of the value: a parameter
    stands still, and a second moment that decays by 1/1000 a step never decays. Rounded stochastically, they move by
    one unit now and then, and by the right amount on average; so parameters need no master. The random bits are a hash
    of the seed, the parameter's number, the element's index in it, and the step: they do not depend on threads or
    ranks, nothing is stored, and shards of a parameter have the bits of the whole (:meth:`FusedOptimizer.place`).

    Example:
        >>> import torch
        >>> from .optim import FusedSGD
        >>> weight = torch.nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
        >>> optimizer = FusedSGD([weight], lr=2.0**-12, rounding=StochasticRounding(seed=1))
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()  # 1 - 2**-12 is no bfloat16
        >>> weight.detach().unique(), round(weight.detach().float().mean().item(), 4)
        (tensor([0.9961, 1.0000], dtype=torch.bfloat16), 0.9998)

    Reference:
        Zamirai et al., Revisiting BFloat16 Training, 2020, https://arxiv.org/abs/2010.06192.
    """

    seed: int = 0
    """Of the random bits; runs with one seed have the same bits."""

    def key(self, *parts: int, first: int) -> Tensor:
        """Return the key of an array: ``parts`` tell it and the step, ``first`` is the index of its first element."""
        from .backends.plain.stochastic import key_of

        return key_of(self.seed, *parts, first=first)
