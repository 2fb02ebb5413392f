"""A partitioned model of which each tensor-parallel rank has some blocks, as one partitioned model.

[Note: Tensor ranks]
Tensor-parallel ranks have the same data, and parameters of two kinds: blocks, which one rank alone has under names of
their own, and parameters that all have, with the same values and gradients. Of the latter the first rank's count in
what is put together: in norms, in checkpoints, in files of weights. Norms are exact sums of the squares of each block
and of what all ranks have, so they have the same bits on any number of ranks that have the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ._control import Control, everybody
from .chunks import JoinedNorm, JoinedState
from .split_weights import SplitWeights

if TYPE_CHECKING:
    from .protocols import BlockCall, Json, Sharded, StateSource
    from .tensor_protocols import SplitModel

BLOCKS = "tensor_blocks"
"""Key in the scalars of a checkpoint: how many blocks a layer has."""


class Ranks(NamedTuple):
    """Who this rank splits layers, and shares data, with."""

    control: Control  # the tensor-parallel ranks
    data: Control  # the data-parallel ranks
    group: dist.ProcessGroup | None  # the tensor-parallel ranks, for tensors
    device: torch.device | None  # where messages of that group live


class SplitSharded:
    """Plays the role ``Sharded``; see [Note: Tensor ranks].

    Args:
        inner: The partitioned model of this rank, in which blocks are separate parts.
        made: What was split.
        ranks: With whom.
    """

    def __init__(self, inner: Sharded, made: SplitModel, ranks: Ranks) -> None:
        self.module: nn.Module = inner.module
        self.optimizer = inner.optimizer
        self.access = inner.access
        self.parking = inner.parking
        self._inner = inner
        self._made = made
        self._control = ranks.control
        names = dict(inner.module.named_parameters(remove_duplicate=False))
        self._blocks = {name for name, param in names.items() if param in made.blocks}
        own = {name: [*shape] for name, shape in inner.state().shapes.items()}
        rows = everybody(ranks.control, own)
        self._shapes = {name: torch.Size(shape) for row in rows for name, shape in row.items()}
        self.weights = SplitWeights(
            inner, made, control=ranks.control, data=ranks.data, group=ranks.group, device=ranks.device
        )

    # Before training #

    @property
    def has_blocks(self) -> bool:
        """Whether there is anything to compile, or to run in another way."""
        return self._inner.has_blocks

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._inner.is_compiled

    def compile(self, **settings: Any) -> None:
        """Compile the blocks of the model."""
        self._inner.compile(**settings)

    def wrap_blocks(self, call: BlockCall) -> None:
        """Run each block of the model as ``call(forward, *args, **kwargs)``."""
        self._inner.wrap_blocks(call)

    # Training #

    def set_sync(self, *, enabled: bool) -> None:
        """Whether a backward pass sends its gradients over the data-parallel ranks."""
        self._inner.set_sync(enabled=enabled)

    def unshard(self, part: nn.Module) -> None:
        """Make this rank's parameters below ``part`` whole."""
        self._inner.unshard(part)

    def reshard(self, part: nn.Module) -> None:
        """Give back what :meth:`unshard` made whole."""
        self._inner.reshard(part)

    def reduce(self, part: nn.Module) -> None:
        """Send the gradients below ``part`` now."""
        self._inner.reduce(part)

    def grad_norm(self) -> JoinedNorm:
        """Norm of the mean gradient over the blocks of all ranks; all ranks call it.

        Raises:
            RuntimeError: What all ranks have, has other gradients on some of them.
        """
        norm = self._inner.grad_norm()
        pairs = [*zip(norm.squares, norm.parts, strict=True)]
        common = [square for square, part in pairs if part is None]
        separate = [square for square, part in pairs if part is not None]
        found = [_Row(*row) for row in everybody(self._control, [common, separate, norm.culprit])]
        # from here on nothing is this rank's own: what is decided by the norm is decided alike on all ranks
        _check_common(found)
        squares = (*found[0].common, *(square for row in found for square in row.separate))
        total = math.fsum(squares)
        culprit = next((row.culprit for row in found if row.culprit is not None), None)
        value = math.sqrt(total) * norm.scale if math.isfinite(total) else total
        return JoinedNorm(value, culprit, squares, (None,) * len(squares), norm.scale)

    @property
    def micro_batches(self) -> int:
        """Backward passes on this rank since the last step."""
        return self._inner.micro_batches

    def step(self, scale: float = 1.0) -> None:
        """Update with the mean gradient times ``scale``, and drop the gradients; all ranks call it."""
        self._inner.step(scale)

    def drop_gradients(self) -> None:
        """Forget all gradients since the last step."""
        self._inner.drop_gradients()

    # State #

    def state(self) -> JoinedState:
        """Return live views of what this rank saves; shapes are those of all blocks."""
        state = self._inner.state()
        pieces = [piece for piece in state.pieces if self._control.rank == 0 or piece.name in self._blocks]
        return JoinedState(pieces, self._shapes, {**state.scalars, BLOCKS: self._made.num_blocks})

    def load_state(self, source: StateSource, *, optimizer: bool = True, strict: bool = True) -> None:
        """Replace this rank's state by that of ``source``, which any number of ranks has saved."""
        self._inner.load_state(source, optimizer=optimizer, strict=strict)


class _Row(NamedTuple):
    """What one rank knows of the norm."""

    common: Sequence[float]
    separate: Sequence[float]
    culprit: str | None


def _check_common(found: Sequence[_Row]) -> None:
    # as text: one not-a-number is as good as another
    others = [rank for rank, row in enumerate(found) if [*map(repr, row.common)] != [*map(repr, found[0].common)]]
    if others:
        raise RuntimeError(
            f"gradients of parameters that all tensor-parallel ranks have are other ones on ranks {others} than on "
            "rank 0 of their group: these ranks were fed other data (each micro-batch goes to all ranks of a group, "
            "data are dealt by data rank); or such a parameter stands between split layers, where each rank has its "
            "own part of a tensor (split it, or do without); or an operation gives other bits each time "
            "(torch.use_deterministic_algorithms)"
        )


def check_blocks(saved: Mapping[str, Json], here: Mapping[str, Json], tag: str) -> None:
    """Refuse a checkpoint of a model that is split into another number of blocks.

    Args:
        saved: Scalars of the checkpoint.
        here: Of this run.
        tag: Names the checkpoint.

    Raises:
        ValueError: It is.

    Example:
        >>> check_blocks({"tensor_blocks": 4}, {}, "global_step7")
        Traceback (most recent call last):
        ...
        ValueError: checkpoint 'global_step7' is of a model split into 4 blocks, this run's model is not split: set \
tensor_parallel.blocks as it was
    """
    there, own = saved.get(BLOCKS), here.get(BLOCKS)
    if there != own:
        raise ValueError(
            f"checkpoint {tag!r} is of a model {_said(there)}, this run's model is {_said(own)}: set "
            "tensor_parallel.blocks as it was"
        )


def _said(blocks: Json) -> str:
    return "not split" if blocks is None else f"split into {blocks} blocks"
