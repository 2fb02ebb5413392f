"""The stages of one rank of a pipeline, each partitioned over the same data-parallel ranks, as one partitioned model.

[Note: Chunks]
Every stage of a rank is a partitioned model of its own, because its backward passes are counted by themselves: they
come in the order of a schedule. Norms are put together over stages and ranks from exact sums, see ``GradNorm.squares``,
so that they have the bits of the norm over the same parts in one process. The optimizer that users see is that of the
rank's first trained stage; the others' settings follow it at each step. A rank none of whose stages is trained has an
optimizer over nothing, with another rank's settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ._control import everybody
from .chunk_access import ChunkAccess, ChunkParking
from .chunk_weights import ChunkWeights

if TYPE_CHECKING:
    from ._control import Control
    from .axes import Axes
    from .protocols import BlockCall, Json, Piece, Sharded, StateSource


_OWN_KEYS = frozenset({"params", "param_names"})
"""Of a parameter group, what no other stage's has."""


class JoinedNorm(NamedTuple):
    """Plays the role ``GradNorm``."""

    value: float
    culprit: str | None
    squares: tuple[float, ...]
    parts: tuple[int | None, ...]
    scale: float


class JoinedState(NamedTuple):
    """Plays the role ``PartState``."""

    pieces: Sequence[Piece]
    shapes: Mapping[str, torch.Size]
    scalars: Mapping[str, Json]


class Chunks:
    """Plays the role ``Sharded``; see [Note: Chunks].

    Args:
        chunks: The partitioned stages of this rank, by stage.
        control: The ranks of the pipeline.
        axes: Who it shares the pipeline and the data with.
        num_micro_batches: That a step takes.
    """

    def __init__(self, chunks: Mapping[int, Sharded], control: Control, axes: Axes, *, num_micro_batches: int) -> None:
        self.module = nn.ModuleDict({str(stage): chunk.module for stage, chunk in chunks.items()})
        self._chunks = chunks
        self._control = control
        self._trained = [chunk for chunk in chunks.values() if chunk.optimizer is not None]
        self.optimizer = self._trained[0].optimizer if self._trained else None
        self._num_micro_batches = num_micro_batches
        self._is_compiled = False
        self.has_run = False  # whether there were passes since the last step
        settings = everybody(control, _settings(self.optimizer))
        if self.optimizer is None and any(row is not None for row in settings):
            self.optimizer = _optimizer_over_nothing(next(row for row in settings if row is not None))
        self._num_data_ranks = axes.num_data_ranks
        own = {name: [*shape] for chunk in chunks.values() for name, shape in chunk.state().shapes.items()}
        shapes = everybody(control, own)
        self._shapes = {name: torch.Size(shape) for row in shapes for name, shape in row.items()}
        owners = {name: rank for rank, row in enumerate(shapes) for name in row}
        self.access = ChunkAccess([*chunks.values()], owners, control.rank)
        self.parking = ChunkParking([chunk.parking for chunk in chunks.values()])
        self.weights = ChunkWeights(chunks, control, writes=axes.data_rank == axes.tensor_rank == 0, group=axes.pipe)

    # Before training #

    @property
    def has_blocks(self) -> bool:
        """Whether a stage of this rank has anything to compile, or to run in another way."""
        return any(chunk.has_blocks for chunk in self._chunks.values())

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._is_compiled

    def compile(self, **settings: Any) -> None:
        """Compile the blocks of every stage; one that has none, such as an embedding, stays as it is.

        Raises:
            ValueError: No stage of any rank has a block.
            RuntimeError: It is compiled already.
        """
        if self._is_compiled:
            raise RuntimeError("the model is compiled already: compile it once, with all settings")
        for chunk in self._with_blocks("to compile"):
            chunk.compile(**settings)
        self._is_compiled = True

    def wrap_blocks(self, call: BlockCall) -> None:
        """Run each block of every stage as ``call(forward, *args, **kwargs)``.

        Raises:
            ValueError: No stage of any rank has a block.
        """
        for chunk in self._with_blocks("to recompute"):
            chunk.wrap_blocks(call)

    def _with_blocks(self, purpose: str) -> list[Sharded]:
        if not any(everybody(self._control, self.has_blocks)):
            raise ValueError(
                f"no stage has anything {purpose}: none has a block; name the classes of the model's blocks in "
                "unit_classes"
            )
        return [chunk for chunk in self._chunks.values() if chunk.has_blocks]

    # Training #

    def set_sync(self, *, enabled: bool) -> None:
        """Whether a backward pass sends its gradients."""
        for chunk in self._chunks.values():
            chunk.set_sync(enabled=enabled)

    def unshard(self, part: nn.Module) -> None:
        """Make the parameters below ``part`` whole, in whichever stage they are."""
        for chunk in self._chunks.values():
            chunk.unshard(part)

    def reshard(self, part: nn.Module) -> None:
        """Give back what :meth:`unshard` made whole."""
        for chunk in self._chunks.values():
            chunk.reshard(part)

    def reduce(self, part: nn.Module) -> None:
        """Send the gradients below ``part`` now."""
        for chunk in self._chunks.values():
            chunk.reduce(part)

    def grad_norm(self) -> JoinedNorm:
        """Norm of the mean gradient over all stages, ranks and micro-batches since the last step; all ranks call it."""
        norms = [chunk.grad_norm() for chunk in self._trained]
        squares = [value for norm in norms for value in norm.squares]
        culprit = next((norm.culprit for norm in norms if norm.culprit is not None), None)
        found = [_Row(*row) for row in everybody(self._control, [squares, culprit, self.micro_batches])]
        # exact sums: neither the number of ranks nor their order changes a bit
        total = math.fsum(value for row in found for value in row.squares)
        count = max(row.micro_batches for row in found) * self._num_data_ranks
        value = math.sqrt(total) * (1.0 / count) if math.isfinite(total) else total
        culprits = [row.culprit for row in found if row.culprit is not None]
        joined = tuple(value for row in found for value in row.squares)
        return JoinedNorm(value, culprits[0] if culprits else None, joined, (None,) * len(joined), 1.0 / count)

    @property
    def micro_batches(self) -> int:
        """Micro-batches since the last step: backward passes of each trained stage."""
        if not self._trained:
            return self._num_micro_batches if self.has_run else 0
        return max(chunk.micro_batches for chunk in self._trained)

    def step(self, scale: float = 1.0) -> None:
        """Update all stages with the mean gradient times ``scale``, and drop the gradients; all ranks call it."""
        for chunk in self._trained:
            self._follow(chunk)
            chunk.step(scale)
        self.has_run = False

    def drop_gradients(self) -> None:
        """Forget all gradients since the last step."""
        self.has_run = False
        for chunk in self._chunks.values():
            chunk.drop_gradients()

    # State #

    def state(self) -> JoinedState:
        """Return live views of the state of this rank's stages; shapes are those of the whole model."""
        states = [chunk.state() for chunk in self._chunks.values()]
        pieces = [piece for state in states for piece in state.pieces]
        own: dict[str, Json] = {}
        for state in states:
            own = _merged(own, state.scalars)
        scalars: dict[str, Json] = {}
        for row in everybody(self._control, own):
            scalars = _merged(scalars, row)
        return JoinedState(pieces, self._shapes, scalars)

    def load_state(self, source: StateSource, *, optimizer: bool = True, strict: bool = True) -> None:
        """Replace the state of this rank's stages by that of ``source``, which may be of any cut."""
        for chunk in self._chunks.values():
            chunk.load_state(source, optimizer=optimizer, strict=strict)

    def _follow(self, chunk: Sharded) -> None:
        """Give the optimizer of ``chunk`` the settings of the one that users see."""
        if self.optimizer is None or chunk.optimizer is None or chunk.optimizer is self.optimizer:
            return
        for group, leader in zip(chunk.optimizer.param_groups, self.optimizer.param_groups, strict=True):
            group.update({key: value for key, value in leader.items() if key not in _OWN_KEYS})


class _Row(NamedTuple):
    """What one rank knows of the norm."""

    squares: Sequence[float]
    culprit: str | None
    micro_batches: int


def _settings(optimizer: torch.optim.Optimizer | None) -> list[Json] | None:
    """Return what of an optimizer's parameter groups is plain values; None where there is none."""
    if optimizer is None:
        return None
    return [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, (bool, int, float, str)) and key not in _OWN_KEYS
        }
        for group in optimizer.param_groups
    ]


def _optimizer_over_nothing(settings: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Return an optimizer without parameters, for schedules of the learning rate to work on."""
    return torch.optim.SGD([{**group, "params": []} for group in settings], lr=0.0)


def _merged(first: Json, second: Json) -> Any:
    """Return one object with the keys of both; where they differ the first counts."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first
    both = {key: _merged(first[key], second[key]) for key in first.keys() & second.keys()}
    return {**second, **first, **both}
