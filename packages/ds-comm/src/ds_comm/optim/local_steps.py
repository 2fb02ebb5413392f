"""Local steps: ranks train by themselves, and now and then take a common outer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from .link import Link, int4_codec
from .rounds import RoundOptimizer

if TYPE_CHECKING:
    from ..codec import Codec


class LocalSteps(RoundOptimizer):
    """DiLoCo: every ``every`` steps of any optimizer, one outer step of Nesterov momentum.

    Each rank steps ``inner`` with its own gradients. At the end of a round ``d = mean over ranks of (anchor - p)``,
    compressed with error feedback, is the outer gradient: ``b = momentum b + d``, ``p = anchor - lr (d + momentum b)``.

    An exchange takes, for N ranks and the default code, ``2 (N - 1) / N`` times 0.53 bytes per parameter each way; that
    is divided by ``every``. Memory: 16 bytes per parameter beside ``inner`` (momentum, anchor, message, worker error),
    ``4 / N`` of server error, and three payloads.

    Step this optimizer in place of ``inner``; learning rate schedules stay with ``inner``, whose state differs between
    ranks and is not part of this state: save ``inner.state_dict()`` for each rank, or let it start anew. Deviation from
    the paper: outer gradients in a few bits. See [Note: Training with these optimizers] in ``base.py`` and
    [Note: Rounds] in ``rounds.py``.

    Args:
        inner: Steps the parameters of one rank.
        every: Steps in a round.
        lr: Learning rate of the outer step.
        momentum: Momentum of the outer step.
        codec: Codes the outer gradient; None: as for :class:`CompressedAdam`.
        link: The ranks, and what holds for all messages.

    Raises:
        ValueError: A setting is out of its bounds.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = LocalSteps(torch.optim.SGD([weight], lr=0.1), every=2, lr=0.5, momentum=0.0)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([1.0])
        ...     optimizer.step()
        >>> weight.detach()  # half of what two steps changed
        tensor([0.9000])

    Reference:
        Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023,
        https://arxiv.org/abs/2311.08105.
    """

    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    counters: ClassVar[Mapping[str, float]] = {"step": 0, "round_step": 0}

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        every: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        codec: Codec | None = None,
        link: Link | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, the steps of a round; got {every}")
        self.inner, self.every = inner, every
        groups = [{"params": list(group["params"])} for group in inner.param_groups]
        super().__init__(groups, {"lr": lr, "momentum": momentum}, codec or int4_codec(), link or Link())

    def update(self) -> bool:
        """Step the parameters; return False if some rank's gradients were not finite in the round."""
        self.anchor()
        self._flat.gather(self._message)
        if self.sound(self._message):
            step: Callable[[], object] = self.inner.step
            step()
        self.set_counts(step=self.count("step") + 1, round_step=self.count("round_step") + 1)
        return self.end_round() if self.count("round_step") == self.every else True

    def end_round(self) -> bool:
        """Take the outer step; return False if all ranks went back to where the round began."""
        anchor = self.anchor()
        self._flat.copy_params(self._message)
        torch.sub(anchor, self._message, out=self._message)
        if not self.exchange(anchor):
            return False
        for part, group in zip(self._flat.parts, self.param_groups, strict=True):
            momentum = self._buffers["momentum_buffer"][part].mul_(group["momentum"]).add_(self._message[part])
            self._message[part].add_(momentum, alpha=group["momentum"]).mul_(-float(group["lr"]))
        self._flat.place_params(self._message.add_(anchor))
        return True
