"""The engine of a pipeline: whole steps at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, count
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._control import RankError, everybody
from .engine import Engine
from .stepping import cast_floats

if TYPE_CHECKING:
    from ._control import Control
    from .axes import Axes
    from .data import TrainLoader
    from .loss_scale import LossScale
    from .pipeline_protocols import Pipeline
    from .policy import StepPolicy
    from .protocols import LearningRateSchedule, Sharded
    from .saving import Vault

_WHOLE_STEPS = "a pipeline runs all micro-batches of a step together: call train_batch(), or eval_batch()"


class Batches(NamedTuple):
    """Plays the role ``MicroBatches``."""

    inputs: Sequence[Any]
    targets: Sequence[Any]
    keys: Sequence[int]


class Running(NamedTuple):
    """What a :class:`PipelineEngine` runs steps with."""

    pipeline: Pipeline
    axes: Axes
    control: Control  # of all ranks
    has_first: bool  # whether this rank has the first stage
    has_last: bool  # and the last one


class PipelineEngine(Engine):
    """Trains a model whose stages are on several ranks. Made by :func:`ds_core.initialize` from a ``PipelineModule``.

    A step takes ``gradient_accumulation_steps`` micro-batches on each pipeline, and is :meth:`train_batch`. All else
    is as in :class:`Engine`; ``access``, by the names of the whole model, reaches the parameters of this rank's stages.
    """

    def __init__(
        self,
        sharded: Sharded,
        policy: StepPolicy,
        running: Running,
        *,
        scale: LossScale,
        vault: Vault,
        lr_scheduler: LearningRateSchedule | None = None,
        training_dataloader: TrainLoader | None = None,
    ) -> None:
        super().__init__(
            sharded,
            policy,
            scale=scale,
            vault=vault,
            lr_scheduler=lr_scheduler,
            training_dataloader=training_dataloader,
        )
        self._running = running
        self._own_data: Iterator[Any] | None = None  # of training_dataloader
        self._sources_agree = False
        self.set_gradient_accumulation_boundary(is_boundary=True)  # each call of the pipeline is a step

    # Whole steps #

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Do one optimizer step; all ranks call it.

        Args:
            data_iter: An iterator of micro-batches ``(inputs, targets)`` of this rank's data; read on the ranks of the
                first and of the last stage, which have to see the same ones. None, on all ranks: goes round
                ``training_data``.

        Returns:
            The mean loss of the step over all micro-batches and all pipelines, on every rank; float32, 0D.

        Raises:
            ValueError: There is no data, or it ends within a step, or it is no iterator; nothing was changed, but the
                micro-batches that were read are used up.
            RankError: The data of another rank ended, or raised; names it. Nothing was changed.
            PipelineError: A message did not come, or a stage raised.

        Example:
            >>> import torch
            >>> from ds_core import initialize
            >>> from ds_core.pipeline_engine import PipelineEngine
            >>> PipelineEngine.train_batch.__name__  # see the README of ds-pipe for a whole program
            'train_batch'
        """
        self._check_sources(data_iter)
        self.module.train()
        batches = self._drawn(data_iter, goes_round=True)
        found = self._running.pipeline.train(batches, scale=self._scale.scale)
        self._scaled = self._sharded.micro_batches
        losses = [float(loss) for loss in found]
        super().step()
        return self._mean(losses)

    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Return the mean loss of as many micro-batches as a step takes, with no backward pass; all ranks call it.

        Args:
            data_iter: An iterator as for :meth:`train_batch`, of other data: what it yields is used up.

        Raises:
            ValueError, RankError, PipelineError: As of :meth:`train_batch`.
        """
        training = self.module.training
        self.module.eval()
        try:
            found = self._running.pipeline.evaluate(self._drawn(data_iter))
        finally:
            self.module.train(training)
        return self._mean([float(loss) for loss in found])

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: no rank has the whole model."""
        raise RuntimeError(_WHOLE_STEPS)

    def backward(self, loss: Tensor) -> NoReturn:
        """Raise: backward passes are part of :meth:`train_batch`."""
        raise RuntimeError(_WHOLE_STEPS)

    def step(self) -> NoReturn:
        """Raise: the update is part of :meth:`train_batch`."""
        raise RuntimeError(_WHOLE_STEPS)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str, dict[str, Any]]:
        """Go on from a checkpoint, whatever cut and number of ranks wrote it; see :meth:`Engine.load_checkpoint`."""
        self._own_data = None  # the loader goes on elsewhere
        return super().load_checkpoint(*args, **kwargs)

    # Where this rank is #

    def is_first_stage(self) -> bool:
        """Whether this rank has the first stage, and reads inputs."""
        return self._running.has_first

    def is_last_stage(self) -> bool:
        """Whether this rank has the last stage, and reads targets."""
        return self._running.has_last

    @property
    def axes(self) -> Axes:
        """This rank's place on the mesh."""
        return self._running.axes

    # Helpers #

    def _check_sources(self, data_iter: Iterator[Any] | None) -> None:
        """Refuse inputs from one source and targets from another; at the first step, where all ranks are asked."""
        if self._sources_agree:
            return
        source = ("training_data" if data_iter is None else "data_iter") if self._reads else None
        rows = everybody(self._running.control, source)
        if len(set(rows) - {None}) > 1:
            raise ValueError(
                f"some ranks pass data_iter and others leave it to training_data: {rows}, by rank; the ranks of the "
                "first and of the last stage have to read the same micro-batches"
            )
        self._sources_agree = True

    @property
    def _reads(self) -> bool:
        """Whether this rank needs micro-batches."""
        return self._running.has_first or self._running.has_last

    def _drawn(self, source: Iterator[Any] | None, *, goes_round: bool = False) -> Batches:
        """Take the micro-batches of one step; if a rank cannot, no rank begins it."""
        control = self._running.control
        try:
            batches = self._draw(self._rounds() if source is None and goes_round and self._reads else source)
        except Exception as error:
            with suppress(RankError):  # it is for the others
                control.all_ok(f"{type(error).__name__}: {error}")
            raise
        control.all_ok(None)
        return batches

    def _draw(self, source: Iterator[Any] | None) -> Batches:
        """Take the micro-batches of one step, as far as this rank needs them."""
        number, axes, running = self._policy.accumulation, self._running.axes, self._running
        first = self._counters.micro_steps
        keys = [(first + index) * axes.num_data_ranks + axes.data_rank for index in range(number)]
        if not self._reads:
            return Batches((), (), keys)
        if source is None:
            raise ValueError("an evaluation reads data of its own: pass an iterator of pairs (inputs, targets)")
        if iter(source) is not source:
            raise ValueError(
                f"a {type(source).__name__} begins anew whenever it is read: pass an iterator over it, made once, "
                "iter(...), and a new one when it has ended"
            )
        drawn = [pair for _, pair in zip(range(number), source)]
        if len(drawn) < number:
            raise ValueError(f"a step takes {number} micro-batches on each pipeline; the data ended after {len(drawn)}")
        for pair in drawn:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"micro-batches are pairs (inputs, targets); got {type(pair).__name__}")
        dtype = self._policy.cast_inputs
        inputs = [pair[0] if dtype is None else cast_floats(pair[0], dtype) for pair in drawn]
        return Batches(
            inputs if running.has_first else (), [pair[1] for pair in drawn] if running.has_last else (), keys
        )

    def _rounds(self) -> Iterator[Any]:
        loader = self.training_dataloader
        if loader is None:
            raise ValueError("there is no data: pass an iterator, or training_data to initialize()")
        if self._own_data is None:
            self._own_data = chain.from_iterable(loader for _ in count())
        return self._own_data

    def _mean(self, losses: list[float]) -> Tensor:
        rows = everybody(self._running.control, losses)
        known = [loss for row in rows for loss in row]
        return torch.tensor(math.fsum(known) / len(known))
