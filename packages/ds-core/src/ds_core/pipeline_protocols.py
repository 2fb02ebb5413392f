"""The roles of pipeline parallelism: a model in stages, whoever cuts it, and whoever runs it.

ds-core brings together what the stages of one rank compute and what a partitioner does with their parameters; neither
knows the other. See [Note: Roles] in ``protocols``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn


class StageParameters(Protocol):
    """What a pipeline asks of whoever holds the parameters of its stages."""

    def unshard(self, stage: int) -> None:
        """Make them whole."""

    def reshard(self, stage: int) -> None:
        """Free what :meth:`unshard` made whole."""

    def reduce(self, stage: int) -> None:
        """Sum their gradients over the data-parallel ranks, as far as that was not done in the backward passes."""


class MicroBatches(Protocol):
    """What a pipeline reads of the micro-batches of one step."""

    @property
    def inputs(self) -> Sequence[Any]:
        """What the first stage takes; empty on other ranks."""

    @property
    def targets(self) -> Sequence[Any]:
        """What the loss takes; empty on other ranks than the last stage's."""

    @property
    def keys(self) -> Sequence[int]:
        """Of each micro-batch the key of its random numbers; no two of a run have the same."""


class Pipeline(Protocol):
    """One rank's part of a pipeline."""

    def train(self, batches: MicroBatches, *, scale: float) -> Sequence[Tensor]:
        """Run all forward and backward passes of one step.

        Each loss is multiplied by ``scale`` before its backward pass.

        Returns:
            On the rank of the last stage the loss of each micro-batch; nothing elsewhere.
        """

    def evaluate(self, batches: MicroBatches) -> Sequence[Any]:
        """Run the forward passes; returns losses, or outputs where there are no targets, as :meth:`train` does."""


class Stages(Protocol):
    """The stages of one rank, not connected yet."""

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        """By stage; parameters and buffers have the names that they have in the whole model."""

    @property
    def shared(self) -> Collection[str]:
        """Names of the parameters that several stages have in common; each stands in one of ``modules`` only."""

    @property
    def has_first(self) -> bool:
        """Whether this rank has the first stage, which needs the inputs."""

    @property
    def has_last(self) -> bool:
        """Whether this rank has the last stage, which needs the targets."""

    def connect(self, group: dist.ProcessGroup | None, parameters: StageParameters, *, seed: int) -> Pipeline:
        """Return the pipeline.

        Args:
            group: Its ranks, in the order of the stages.
            parameters: Who holds the parameters of ``modules``.
            seed: Of random numbers in the forward pass.
        """


class PipelineBuilder(Protocol):
    """Plays the role ``ds.pipeline``."""

    def cut(self, model: Any, *, rank: int, num_ranks: int, num_micro_batches: int) -> Stages:
        """Build what rank ``rank`` of a pipeline has of ``model``."""


class StagedModel(Protocol):
    """A model that is described, not built; what else it has is between it and its :class:`PipelineBuilder`."""

    @property
    def num_stages(self) -> int | None:
        """Ranks of one pipeline, where the model says how many."""
