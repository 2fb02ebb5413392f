"""Runs a schedule on one rank: one small function for each operation, in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .instruction import Instruction, Op, Value
from .messages import Arrival, Messages
from .schedule import Schedule, splits_backward
from .stage import Kept, Stage


class PipelineError(RuntimeError):
    """A rank cannot go on; says at which instruction, and what it waits for."""


class Parameters(Protocol):
    """What a schedule asks of whoever holds the parameters of a stage."""

    def unshard(self, stage: int) -> None:
        """Gather them."""

    def reshard(self, stage: int) -> None:
        """Free what was gathered."""

    def reduce(self, stage: int) -> None:
        """Sum their gradients over the data-parallel ranks."""


class Whole:
    """Plays the role ``Parameters`` where every rank has all of its stages' parameters, and nobody else has."""

    def unshard(self, stage: int) -> None:
        """They are there."""

    def reshard(self, stage: int) -> None:
        """They stay."""

    def reduce(self, stage: int) -> None:
        """There is nobody to add to."""


class _Step:
    """What a rank holds within one step."""

    def __init__(
        self,
        inputs: Sequence[Any],
        targets: Sequence[Any],
        scale: float,
        around: Callable[[int, int], AbstractContextManager[None]],
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.scale = scale
        self.around = around
        self.values: dict[Value, Any] = {}  # received, under way, or computed
        self.losses: list[Tensor] = []


def _nothing_around(_stage: int, _micro_batch: int) -> AbstractContextManager[None]:
    return nullcontext()


class Pipeline:
    """One rank's part of a pipeline.

    Gradients are those of the mean loss of the micro-batches, added up in ``.grad`` in the order of the schedule; all
    fixed schedules have one order, so the bits are those of the same micro-batches without a pipeline.

    Args:
        schedule: A valid one; see ``validate``.
        stages: The modules of this rank's stages, by stage; see ``Stage``.
        group: The ranks of the pipeline; rank 0 of the schedule is rank 0 of the group. None: one process.
        loss: Maps output and target to a number; needed on the rank of the last stage.
        parameters: Who holds the parameters; None: each rank its own.
        timeout: How long a message may take.

    Raises:
        ValueError: The stages or the group are not those of the schedule.

    Example:
        >>> from .build import make_schedule
        >>> model = nn.Linear(2, 1)
        >>> schedule = make_schedule("1f1b", num_ranks=1, num_micro_batches=2)
        >>> pipeline = Pipeline(schedule, {0: model}, None, loss=nn.functional.mse_loss)
        >>> losses = pipeline.run([torch.ones(4, 2)] * 2, [torch.zeros(4, 1)] * 2)
        >>> len(losses), model.weight.grad.shape
        (2, torch.Size([1, 2]))
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, nn.Module],
        group: dist.ProcessGroup | None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        parameters: Parameters | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        own, last = schedule.stages_of(self.rank), schedule.num_stages - 1
        if size != schedule.num_ranks or tuple(sorted(stages)) != own:
            raise ValueError(
                f"rank {self.rank} of {size} has the stages {sorted(stages)}; the schedule {schedule.name!r} is for "
                f"{schedule.num_ranks} ranks, and this one has {list(own)}"
            )
        if last in own and schedule.trains and loss is None:
            raise ValueError(f"rank {self.rank} has the last stage, {last}: it needs the loss")
        splits = splits_backward(schedule)
        self.schedule = schedule
        self._stages = {
            index: Stage(module, loss=loss if index == last else None, splits=splits)
            for index, module in stages.items()
        }
        self._row = schedule.rows[self.rank]
        self._timeout = timeout
        self._messages = None if group is None else Messages(group, schedule.num_micro_batches, timeout)
        self._parameters = parameters or Whole()

    def run(
        self,
        inputs: Sequence[Any] = (),
        targets: Sequence[Any] = (),
        *,
        scale: float | None = None,
        around: Callable[[int, int], AbstractContextManager[None]] | None = None,
    ) -> list[Any]:
        """Do one step but for the optimizer's part, which is the caller's.

        Args:
            inputs: The micro-batches; needed on the rank of the first stage.
            targets: Their targets; needed on the rank of the last stage, if it has a loss.
            scale: What each loss is multiplied by before its backward pass; None: one over their number.
            around: Returns what is entered around each forward pass, given stage and micro-batch.

        Returns:
            On the rank of the last stage the loss of each micro-batch, or its output without a loss (in an evaluation,
            without targets); else nothing.

        Raises:
            PipelineError: A message did not come; names instruction, message and rank.
            ValueError: Too few micro-batches.
        """
        self._check(inputs, targets)
        scale = 1 / self.schedule.num_micro_batches if scale is None else scale
        step = _Step(inputs, targets, scale, around or _nothing_around)
        with torch.set_grad_enabled(self.schedule.trains):
            for index, one in enumerate(self._row):
                try:
                    _RUN[one.op](self, step, one)
                except RuntimeError as error:
                    raise PipelineError(
                        f"rank {self.rank} failed at instruction {index} of {len(self._row)}, {one}"
                        f"{self._awaited(one)}: {error}"
                    ) from error
        if self._messages is not None:
            self._messages.finish()
        return step.losses

    def _check(self, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
        count, last = self.schedule.num_micro_batches, self.schedule.num_stages - 1
        if 0 in self._stages and len(inputs) != count:
            raise ValueError(f"the first stage needs {count} micro-batches; got {len(inputs)}")
        if last in self._stages and self.schedule.trains and len(targets) != count:
            raise ValueError(f"the last stage needs {count} targets; got {len(targets)}")

    def _awaited(self, one: Instruction) -> str:
        senders = {other.writes[0]: other.peer for other in self._row if other.op is Op.RECV}
        awaited = [f"{value} (rank {senders[value]} -> {self.rank})" for value in one.reads if value in senders]
        return f", which needs {' and '.join(awaited)}" if awaited else ""

    def _take(self, step: _Step, value: Value) -> Any:
        """Return a value, once it is there."""
        found = step.values[value]
        if isinstance(found, Arrival):
            found = step.values[value] = found.wait(self._timeout)
        return found

    # Operations #

    def _forward(self, step: _Step, one: Instruction) -> None:
        stage, index = one.stage, one.micro_batch
        given = self._take(step, Value("x", stage, index)) if stage else step.inputs[index]
        last = stage == self.schedule.num_stages - 1
        target = step.targets[index : index + 1] if last else ()
        with step.around(stage, index):
            out, kept = self._stages[stage].forward(given, target, scale=step.scale)
        if last:
            step.losses.append(out.detach() if self.schedule.trains else out)
        else:
            step.values[Value("x", stage + 1, index)] = out
        if self.schedule.trains:
            step.values[Value("y", stage, index)] = kept
        self._free(step, one)

    def _backward(self, step: _Step, one: Instruction) -> None:
        stage, index = one.stage, one.micro_batch
        kept: Kept = step.values[Value("y", stage, index)]
        grads = self._take(step, Value("g", stage, index)) if stage < self.schedule.num_stages - 1 else None
        found = self._stages[stage].backward(kept, grads)
        if stage:
            step.values[Value("g", stage - 1, index)] = found
        if one.op is Op.B:
            self._stages[stage].settle(kept)
        else:
            step.values[Value("d", stage, index)] = None
        self._free(step, one)

    def _weights(self, step: _Step, one: Instruction) -> None:
        self._stages[one.stage].settle(step.values[Value("y", one.stage, one.micro_batch)])
        self._free(step, one)

    def _send(self, step: _Step, one: Instruction) -> None:
        if self._messages is not None:
            self._messages.send(one.reads[0], step.values[one.reads[0]], one.peer)
        self._free(step, one)

    def _receive(self, step: _Step, one: Instruction) -> None:
        if self._messages is not None:
            step.values[one.writes[0]] = self._messages.receive(one.writes[0], one.peer)

    def _free(self, step: _Step, one: Instruction) -> None:
        for value in one.frees:
            del step.values[value]

    def _unshard(self, step: _Step, one: Instruction) -> None:
        self._parameters.unshard(one.stage)

    def _reshard(self, step: _Step, one: Instruction) -> None:
        self._parameters.reshard(one.stage)

    def _reduce(self, step: _Step, one: Instruction) -> None:
        self._parameters.reduce(one.stage)

    def _step(self, step: _Step, one: Instruction) -> None:
        """The optimizer is the caller's."""


_RUN: Mapping[Op, Callable[[Pipeline, _Step, Instruction], None]] = MappingProxyType(
    {
        Op.F: Pipeline._forward,
        Op.B: Pipeline._backward,
        Op.I: Pipeline._backward,
        Op.W: Pipeline._weights,
        Op.SEND: Pipeline._send,
        Op.RECV: Pipeline._receive,
        Op.UNSHARD: Pipeline._unshard,
        Op.RESHARD: Pipeline._reshard,
        Op.REDUCE: Pipeline._reduce,
        Op.OPT: Pipeline._step,
    }
)
