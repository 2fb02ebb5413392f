"""Runs a schedule on one rank: one small function for each operation, in a table.

[Note: Early receives]
A sender sends when the receiver has posted its receive. Rows say when the message comes if all goes as planned; in case
it comes earlier, a receive is posted some computations before its place in the row. Nobody waits for a receive but who
needs its value, so the order of everything else stays as it is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .alarm import Alarm, PipelineError
from .instruction import COMPUTE, Instruction, Op, Value
from .messages import Arrival, MessageError, Messages
from .noting import told
from .schedule import Row, Schedule, splits_backward
from .skips import Skip, leaving
from .stage import Kept, Stage

if TYPE_CHECKING:
    from .costs import Costs
    from .times import Times

_EARLY = 2  # computations; see [Note: Early receives]


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
        self.at = -1  # in the row; -1: before, its length: after

    def where(self, row: Row) -> str:
        """Say how far it is."""
        if 0 <= self.at < len(row):
            return f"at instruction {self.at} of {len(row)}, {row[self.at]}"
        return "after its last instruction" if row and self.at > 0 else "before its first instruction"


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
        timeout: How long a message may take; then, as after any failure, all ranks end with the cause, and the group is
            closed.
        lends: By name of each constant skip that leaves a stage of this rank, the weight that it is; see ``Borrower``.
        model: A text that all ranks have to give alike, as ``PipelineModule.outline`` returns.

    Raises:
        ValueError: The stages, the weights or the group are not those of the schedule.

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
        lends: Mapping[str, Tensor] = MappingProxyType({}),
        model: str = "",
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
        lent = {skip.name for skip in schedule.skips if skip.constant and skip.source in own}
        if lent != lends.keys():
            raise ValueError(f"rank {self.rank} has to lend {sorted(lent)}; got {sorted(lends)}")
        splits = splits_backward(schedule)
        self.schedule = schedule
        self._group = group
        self._of = _of_all(group)
        self._lends = lends
        self._copies = parameters is not None  # what is lent: the owner may free it before it is given back
        self._stages = {
            index: Stage(
                module,
                loss=loss if index == last else None,
                splits=splits,
                hands=[skip.name for skip in _by_target(schedule, index)[::-1] if not skip.constant],
                lends={skip.name: lends[skip.name] for skip in _by_target(schedule, index) if skip.constant},
            )
            for index, module in stages.items()
        }
        self._row = schedule.rows[self.rank]
        self._program = _with_early_receives(self._row, _EARLY)
        self._messages: Messages | None = None
        self._alarm: Alarm | None = None
        self._agreed = group is None  # whether all ranks run this schedule and model
        self._whole = ", ".join(filter(None, [_digest(schedule), model]))
        if group is not None:
            names = [skip.name for skip in schedule.skips]
            self._messages = Messages(group, schedule.num_micro_batches, timeout, names)
            self._alarm = Alarm(group, timeout, self._messages.hang_up)
            self._alarm.offer(self._whole)
        self._parameters = parameters or Whole()

    def run(
        self,
        inputs: Sequence[Any] = (),
        targets: Sequence[Any] = (),
        *,
        scale: float | None = None,
        around: Callable[[int, int], AbstractContextManager[None]] | None = None,
        times: Times | None = None,
    ) -> list[Any]:
        """Do one step but for the optimizer's part, which is the caller's.

        Args:
            inputs: The micro-batches; needed on the rank of the first stage.
            targets: Their targets; needed on the rank of the last stage, if it has a loss.
            scale: What each loss is multiplied by before its backward pass; None: one over their number.
            around: Returns what is entered around each forward pass, given stage and micro-batch.
            times: Notes how long everything takes; see :meth:`costs`.

        Returns:
            On the rank of the last stage the loss of each micro-batch, or its output without a loss (in an evaluation,
            without targets); else nothing.

        Raises:
            PipelineError: This rank or another one cannot go on; names rank, instruction, message and cause.
            ValueError: Too few micro-batches, or the ranks run different schedules or models.
        """
        scale = 1 / self.schedule.num_micro_batches if scale is None else scale
        around = around or _nothing_around
        if times is not None:
            around = times.around({index: stage.module for index, stage in self._stages.items()}, around)
        step = _Step(inputs, targets, scale, around)
        try:
            self._check(inputs, targets)
            with torch.set_grad_enabled(self.schedule.trains):
                for step.at, one in self._program:
                    start, waited = time.perf_counter(), self._waited
                    _RUN[one.op](self, step, one)
                    if times is not None:
                        times.note(one, time.perf_counter() - start - (self._waited - waited))
            step.at = len(self._row)
            if self._messages is not None:
                traffic = self._messages.finish()
                if times is not None:
                    times.note_traffic(traffic)
        except Exception as error:
            self._fail(step, error)
            raise
        return step.losses

    def costs(self, times: Times) -> Costs:
        """Return what steps have cost, on all ranks the same; all ranks call it, between steps.

        What each operation of each stage took, without waiting; messages as they went among computations, and the
        speed of the links, for which some are sent now. From these, ``make_greedy_schedule`` makes a schedule for the
        same stages on the same ranks. A stage whose backward passes were whole in all steps counts as if half of each
        was for weights; one that no message enters, as if its input had no bytes.

        Args:
            times: Of at least one step of all ranks, of this schedule or of one with the same placement.

        Raises:
            ValueError: A stage was not timed.
        """
        return times.costs(self.schedule.num_stages, self._group)

    @property
    def _waited(self) -> float:
        return 0.0 if self._messages is None else self._messages.waited

    def _check(self, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
        count, last = self.schedule.num_micro_batches, self.schedule.num_stages - 1
        if 0 in self._stages and len(inputs) != count:
            raise ValueError(f"the first stage needs {count} micro-batches; got {len(inputs)}")
        if last in self._stages and self.schedule.trains and len(targets) != count:
            raise ValueError(f"the last stage needs {count} targets; got {len(targets)}")
        if self._alarm is not None and not self._agreed:
            self._alarm.compare(self._whole)
            self._agreed = True

    def _fail(self, step: _Step, error: Exception) -> None:
        """Tell all ranks; raise what says where this one was, unless that was before the first instruction."""
        where = step.where(self._row)
        kind = "" if isinstance(error, MessageError) else f"{type(error).__name__}: "
        text = f"rank {self.rank}{self._of} failed {where}: {kind}{told(error)}"
        lost = [error.peer] if isinstance(error, MessageError) else []
        cause = text if self._alarm is None else self._alarm.raise_all(text, lost)
        if cause != text:
            text = f"rank {self.rank}{self._of} ends {where}: {kind}{told(error)}\nbecause {cause}"
        if step.at >= 0:
            raise PipelineError(text) from error

    def _take(self, step: _Step, value: Value) -> Any:
        """Return a value, once it is there."""
        found = step.values[value]
        if isinstance(found, Arrival):
            found = step.values[value] = found.value()
        return found

    # Operations #

    def _forward(self, step: _Step, one: Instruction) -> None:
        stage, index = one.stage, one.micro_batch
        given = self._take(step, Value("x", stage, index)) if stage else step.inputs[index]
        last = stage == self.schedule.num_stages - 1
        target = step.targets[index : index + 1] if last else ()
        skips = {value.name: self._take(step, value) for value in one.reads if value.kind == "s"}
        with step.around(stage, index):
            out, handed, kept = self._stages[stage].forward(given, target, scale=step.scale, skips=skips)
        if last:
            step.losses.append(out.detach() if self.schedule.trains else out)
        else:
            step.values[Value("x", stage + 1, index)] = out
            step.values.update((value, handed[value.name]) for value in one.writes if value.kind == "s")
        if self.schedule.trains:
            step.values[Value("y", stage, index)] = kept
        self._free(step, one)

    def _backward(self, step: _Step, one: Instruction) -> None:
        stage, index = one.stage, one.micro_batch
        kept: Kept = step.values[Value("y", stage, index)]
        grads = self._take(step, Value("g", stage, index)) if stage < self.schedule.num_stages - 1 else None
        skip_grads = {value.name: self._take(step, value) for value in one.reads if value.kind == "t"}
        found, found_skips = self._stages[stage].backward(kept, grads, skip_grads)
        if stage:
            step.values[Value("g", stage - 1, index)] = found
            step.values.update((value, found_skips[value.name]) for value in one.writes if value.kind == "t")
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

    def _lend(self, step: _Step, one: Instruction) -> None:
        for value in one.writes:
            weight = self._lends[value.name]
            stays = self.schedule.placement[value.stage] == self.rank
            lent = weight.detach().clone() if stays and self._copies else weight.detach()
            step.values[value] = lent.requires_grad_(weight.requires_grad)

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


def _of_all(group: dist.ProcessGroup | None) -> str:
    """Return which pipeline this is, where there are ranks besides."""
    if group is None or dist.get_world_size(group) == dist.get_world_size():
        return ""
    return f" of the pipeline of ranks {', '.join(map(str, dist.get_process_group_ranks(group)))}"


def _by_target(schedule: Schedule, stage: int) -> list[Skip]:
    """Return the skips that leave ``stage``, the nearest target's first."""
    return sorted(leaving(schedule.skips, stage), key=lambda skip: skip.target)


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
        Op.LEND: Pipeline._lend,
        Op.RETURN: Pipeline._free,
        Op.REDUCE: Pipeline._reduce,
        Op.OPT: Pipeline._step,
    }
)


def _with_early_receives(row: Row, early: int) -> list[tuple[int, Instruction]]:
    """Return indices in ``row`` and instructions, in the order of running; see [Note: Early receives]."""
    keyed = []
    computed = 0  # computations so far
    for index, one in enumerate(row):
        computed += one.op in COMPUTE
        keyed.append((computed - early if one.op is Op.RECV else computed, one.op is not Op.RECV, index))
    return [(index, row[index]) for _, _, index in sorted(keyed)]


def _digest(schedule: Schedule) -> str:
    """Return a short text that differs for other schedules."""
    content = hashlib.sha256(str(schedule).encode()).hexdigest()[:12]
    return f"{schedule.name} of {schedule.num_ranks} ranks and {schedule.num_micro_batches} micro-batches ({content})"
