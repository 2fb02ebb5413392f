"""The entry point ``pipe`` of group ``ds.pipeline``: a model's stages on one rank, and the pipeline over them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from .build import evaluation_of, make_schedule, with_skips
from .config import PipeConfig
from .costs import Costs
from .host_memory import keep_freed_memory
from .model import PipelineModule
from .part import Part
from .pipeline import Pipeline
from .planned import read_plan
from .replanning import Next, Replanning
from .schedule import Schedule
from .validate import validate

if TYPE_CHECKING:
    from ds_core.pipeline_protocols import MicroBatches, StageParameters
    from ds_core.protocols import BuildContext

MakeSchedule = Callable[[int, int], Schedule]
"""Returns a schedule for a number of ranks and of micro-batches; what a model needs past stages is added to it."""


class StagePipeline:
    """Plays the role ``Pipeline``: steps with backward passes, and without.

    Args:
        training: Says what runs a step.
        evaluation: Runs forward passes.
        parts: The stages.
        seed: Of random numbers in the forward pass.
    """

    def __init__(
        self, training: Callable[[], Next], evaluation: Pipeline, parts: Mapping[int, Part], seed: int
    ) -> None:
        self._training = training
        self._evaluation = evaluation
        self._parts = parts
        self._seed = seed

    def train(self, batches: MicroBatches, *, scale: float) -> Sequence[Tensor]:
        """Run all forward and backward passes of one step; see ``Pipeline.run``."""

        def around(stage: int, micro_batch: int) -> AbstractContextManager[None]:
            return self._parts[stage].keyed(self._seed, batches.keys[micro_batch])

        pipeline, times = self._training()
        return pipeline.run(batches.inputs, batches.targets, scale=scale, around=around, times=times)

    def evaluate(self, batches: MicroBatches) -> Sequence[Any]:
        """Run the forward passes; returns losses, or outputs where there are no targets."""
        return self._evaluation.run(batches.inputs, batches.targets)


class Cut:
    """Plays the role ``Stages``.

    Args:
        schedule: Whole.
        parts: The stages of this rank.
        loss: Maps the last stage's output and a target to a number.
        lent: By name of each tied weight that another stage borrows, the stage of this rank and its name there.
        shared: Names of the parameters that several stages have in common.
        timeout: How long a message may take.
        replan: Steps after which a schedule is made for what they have cost; None: never.
        model: A text of the whole model, the same on all ranks.
    """

    def __init__(
        self,
        schedule: Schedule,
        parts: Mapping[int, Part],
        loss: Callable[[Any, Any], Tensor] | None,
        *,
        lent: Mapping[str, tuple[int, str]],
        shared: Collection[str],
        timeout: timedelta,
        replan: int | None,
        model: str,
    ) -> None:
        self.modules = parts
        self.shared = shared
        self.has_first = 0 in parts
        self.has_last = schedule.num_stages - 1 in parts
        self._schedule = schedule
        self._loss = loss
        self._lent = lent
        self._timeout = timeout
        self._replan = replan
        self._model = model

    def connect(self, group: dist.ProcessGroup | None, parameters: StageParameters, *, seed: int) -> StagePipeline:
        """Return the pipeline over the ranks of ``group``."""
        lends = {name: self.modules[stage].get_parameter(weight) for name, (stage, weight) in self._lent.items()}

        def connected(schedule: Schedule) -> Pipeline:
            return Pipeline(
                schedule,
                self.modules,
                group,
                loss=self._loss,
                parameters=parameters,
                lends=lends,
                timeout=self._timeout,
                model=self._model,
            )

        evaluation = connected(evaluation_of(self._schedule))
        if self._replan is not None:
            agree = _keep if group is None else _of_rank_0
            training = Replanning(self._schedule, connected, self._replan, agree).next
        else:
            always = Next(connected(self._schedule), None)
            training = lambda: always  # noqa: E731
        return StagePipeline(training, evaluation, self.modules, seed)


def _keep(costs: Costs) -> Costs:
    return costs


def _of_rank_0(costs: Costs) -> Costs:
    """Return what the first rank of the job has; a model in stages takes all ranks of the job."""
    given = [costs]
    dist.broadcast_object_list(given, src=0)
    return given[0]


class PipeBuilder:
    """Plays the role ``PipelineBuilder``.

    Args:
        make: Makes the schedule.
        bounds: Where to cut, see ``PipelineModule.bounds``; None: as the model says.
        config: The other settings.
    """

    def __init__(self, make: MakeSchedule, *, bounds: Sequence[int] | None, config: PipeConfig) -> None:
        self._make = make
        self._bounds = bounds
        self._config = config

    def cut(self, model: PipelineModule, *, rank: int, num_ranks: int, num_micro_batches: int) -> Cut:
        """Build what rank ``rank`` of ``num_ranks`` has of ``model``.

        Raises:
            ValueError: The schedule is not for these numbers or does not work, or the model has no loss, too few
                layers, or others than it was planned for.
        """
        if model.loss_fn is None:
            raise ValueError("a pipeline is trained with the loss of its model: PipelineModule(..., loss_fn=...)")
        schedule = self._make(num_ranks, num_micro_batches)
        validate(schedule)
        if not schedule.trains:
            raise ValueError(f"the schedule {schedule.name!r} has no backward passes: it is for evaluation")
        if (schedule.num_ranks, schedule.num_micro_batches) != (num_ranks, num_micro_batches):
            raise ValueError(
                f"the schedule {schedule.name!r} is for {schedule.num_ranks} ranks and {schedule.num_micro_batches} "
                f"micro-batches; a step has {num_ranks} and {num_micro_batches} (gradient_accumulation_steps)"
            )
        bounds = model.bounds(schedule.num_stages) if self._bounds is None else self._bounds
        if len(bounds) != schedule.num_stages + 1 or bounds[-1] != model.num_layers:
            raise ValueError(
                f"the plan cuts {bounds[-1]} layers into {len(bounds) - 1} stages; the model has {model.num_layers} "
                f"layers, the schedule {schedule.num_stages} stages: plan anew"
            )
        skips = model.skips(bounds)
        if set(schedule.skips) != set(skips):
            schedule = with_skips(schedule, skips)
        loans = model.loans(bounds)
        parts = {
            stage: model.build(
                bounds[stage],
                bounds[stage + 1],
                borrows={loan.key: loan.skip for loan in loans if loan.target == stage},
                interval=self._config.activation_checkpoint_interval,
            )
            for stage in schedule.stages_of(rank)
        }
        lent = {loan.skip: (loan.source, loan.weight) for loan in loans if loan.source in parts}
        return Cut(
            schedule,
            parts,
            model.loss_fn,
            lent=lent,
            shared={loan.weight for loan in loans},
            timeout=timedelta(seconds=self._config.timeout),
            replan=self._config.replan,
            model=model.outline(bounds),
        )


class PipePlugin:
    """A plugin of the group ``ds.pipeline``, with a schedule by name or from a file, or one's own.

    Whoever has schedules of their own offers an entry point of that group that names such an object.

    Args:
        make: See ``MakeSchedule``; None: as the configuration says.

    Example:
        >>> from .build import make_schedule
        >>> plugin = PipePlugin(lambda ranks, count: make_schedule("gpipe", num_ranks=ranks, num_micro_batches=count))
        >>> plugin.role_version
        2
    """

    role_version = 2
    config_type = PipeConfig

    def __init__(self, make: MakeSchedule | None = None) -> None:
        self._make = make

    def build(self, config: PipeConfig, context: BuildContext) -> PipeBuilder:
        """Return the builder."""
        del context  # stages are made on the CPU, and moved by the caller
        bounds = None
        make = self._make or _configured(config)
        if config.plan is not None:
            planned = read_plan(Path(config.plan))
            make, bounds = (lambda _num_ranks, _num_micro_batches: planned.schedule), planned.bounds
        if config.keep_freed_memory:
            keep_freed_memory()
        return PipeBuilder(make, bounds=bounds, config=config)


def _configured(config: PipeConfig) -> MakeSchedule:
    if config.schedule_file is not None:
        path = Path(config.schedule_file)
        if not path.is_file():
            raise ValueError(f"schedule_file = {config.schedule_file!r}: there is no such file")
        return lambda _num_ranks, _num_micro_batches: Schedule.parse(path.read_text(encoding="utf-8"))
    name = config.schedule or "1f1b"
    return lambda num_ranks, num_micro_batches: make_schedule(
        name, num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_chunks=config.chunks
    )


pipe = PipePlugin()
