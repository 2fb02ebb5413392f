"""One step of training: forward, backward, update, and what they count.

[Note: One step]
``engine(batch)`` runs the model; ``engine.backward(loss)`` multiplies by the loss scale and lets autograd run, during
which the partitioner reduces gradients; ``engine.step()`` does nothing until the last micro-batch of an optimizer
step, and then: norm of the mean gradient -> skip if it is not finite -> one factor for clipping and loss scale ->
the partitioner's step -> schedule. What happened is returned as a :class:`StepOutcome`.

[Note: Keyed randomness]
Dropout draws from torch's default generators, whose state depends on everything drawn before on this rank. Here
each forward pass in training starts from a state that depends on the run's seed, the global index of the
micro-batch and the number of forward passes of it so far. So micro-batch 17 sees the same dropout mask whichever
rank computes it, after a resize and after a resume. The generators' own states are put back afterwards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from . import loss_scale
from ._log import logger
from .policy import Counters, StepOutcome, StepPolicy

if TYPE_CHECKING:
    from .loss_scale import LossScale
    from .protocols import GradNorm, LearningRateSchedule, Sharded


class Stepping:
    """The part of :class:`ds_core.Engine` that every step runs through.

    Args:
        sharded: The partitioned model.
        policy: How a step is run.
        scale: The loss scale.
        lr_scheduler: Stepped after each update.
    """

    def __init__(
        self, sharded: Sharded, policy: StepPolicy, *, scale: LossScale, lr_scheduler: LearningRateSchedule | None
    ) -> None:
        self.module: nn.Module = sharded.module
        self.optimizer = sharded.optimizer
        self.lr_scheduler = lr_scheduler
        self._sharded = sharded
        self._policy = policy
        self._scale = scale
        self._counters = Counters()
        self._outcome = StepOutcome(boundary=False, skipped=False, grad_norm=None, loss_scale=scale.scale)
        self._boundary: bool | None = None  # what set_gradient_accumulation_boundary said; None: count
        self._forwards = 0  # of the current micro-batch
        self._pending = 0  # micro-batches of this optimizer step that step() has counted
        self._scaled = 0  # backward passes of this optimizer step that the loss scale was applied to
        self._sync = True  # whether backward passes send; see no_sync()
        self._sent = True  # whether the last one did

    # Training, in the order of a step #

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass; in training, with random numbers keyed by the global micro-batch."""
        policy = self._policy
        if policy.cast_inputs is not None:
            args, kwargs = cast_floats((args, kwargs), policy.cast_inputs)
        with record_function("ds.forward"):
            if not self.module.training:
                return self.module(*args, **kwargs)
            index = self._counters.micro_steps * policy.num_ranks + policy.rank
            with keyed_randomness(policy.seed, index, self._forwards, policy.device):
                output = self.module(*args, **kwargs)
        self._forwards += 1
        return output

    def backward(self, loss: Tensor) -> Tensor:
        """Run the backward pass of one micro-batch and reduce its gradients; returns ``loss``.

        The loss is this micro-batch's mean: the engine averages over micro-batches and ranks. A micro-batch has one
        backward pass: where it has several losses, add them up.

        Raises:
            ValueError: The loss is no scalar, or has no graph to go back through.
            RuntimeError: The micro-batch has had its backward pass, and :meth:`step` has not counted it; nothing was
                changed.
        """
        if loss.numel() != 1:
            raise ValueError(f"backward() takes a scalar loss, got shape {list(loss.shape)}: reduce it with .mean()")
        if not loss.requires_grad:
            raise ValueError(
                "backward() takes a loss that depends on trained parameters, got one that requires no gradient: it was "
                "detached, computed under torch.no_grad(), or nothing it depends on is trained"
            )
        if self._boundary is None and self._sharded.micro_batches > self._pending:
            raise RuntimeError(
                "backward() is called a second time for one micro-batch: add its losses up and call backward() once, "
                "then step(); set_gradient_accumulation_boundary() makes every backward pass a micro-batch of its own"
            )
        # float32: a float16 loss would overflow under the scale
        scaled = loss if self._scale.scale == 1.0 else loss.float() * self._scale.scale
        with record_function("ds.backward"):
            scaled.backward()
        self._sent = self._sync
        self._scaled += 1
        return loss

    def step(self) -> StepOutcome:
        """Count one micro-batch; after the last one of an optimizer step, update the parameters.

        Returns:
            What was done.

        Raises:
            RuntimeError: Backward passes and micro-batches do not agree, or there is no optimizer; nothing was changed.
                Or too many steps in a row had gradients that are not finite, or the loss scale cannot go lower; then
                the text names the first parameter concerned, where there is one.
        """
        boundary = self.is_gradient_accumulation_boundary()
        micro_batches = self._checked_micro_batches(boundary=boundary)
        scale = self._scale.scale
        skipped, norm = self._update(scale) if boundary else (False, None)
        self._counters = self._counters._replace(micro_steps=self._counters.micro_steps + micro_batches - self._pending)
        self._forwards = 0
        self._pending, self._scaled = (0, 0) if boundary else (micro_batches, self._scaled)
        if norm is None:
            self._outcome = self._outcome._replace(boundary=False)
            return self._outcome
        value = norm.value / scale
        self._outcome = StepOutcome(boundary=True, skipped=skipped, grad_norm=value, loss_scale=scale)
        self._after_step(skipped=skipped, culprit=norm.culprit)
        return self._outcome

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of its optimizer step."""
        if self._boundary is not None:
            return self._boundary
        return self._pending + 1 >= self._policy.accumulation

    def set_gradient_accumulation_boundary(self, *, is_boundary: bool | None) -> None:
        """Say whether :meth:`step` updates, from now on, instead of counting micro-batches.

        While it is said, ``step`` need not be called for micro-batches in between: every backward pass counts as one.

        Args:
            is_boundary: What holds until the next call; None returns to counting.
        """
        self._boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block, backward passes add gradients up on each rank and send nothing.

        Saves communication and costs memory for whole gradients. The last backward pass of an optimizer step has to
        run outside.
        """
        self._sharded.set_sync(enabled=False)
        self._sync = False
        try:
            yield
        finally:
            self._sync = True
            self._sharded.set_sync(enabled=True)

    def zero_grad(self) -> None:
        """Drop all gradients since the last optimizer step, on every rank; the next micro-batch is its first."""
        self._forwards = self._pending = self._scaled = 0
        self._sharded.drop_gradients()

    # Helpers #

    def _checked_micro_batches(self, *, boundary: bool) -> int:
        """Return the backward passes of this optimizer step; raise unless :meth:`step` can go on with them."""
        if boundary and self.optimizer is None:
            raise RuntimeError(
                "there is no optimizer, so step() has nothing to update: pass one to initialize(), or add the section "
                "'optimizer' to the configuration"
            )
        passes, counted = self._sharded.micro_batches, self._pending + 1
        if passes != counted if self._boundary is None else boundary and not passes:
            raise RuntimeError(
                f"step() is called for micro-batch {counted} since the last update, but the number of backward passes "
                f"since then is {passes}: add the losses up and call backward() once per micro-batch, on parameters "
                "that are trained, then step(); or drop the gradients with zero_grad()"
            )
        if self._scale.scale != 1.0 and passes != self._scaled:
            raise RuntimeError("loss.backward() does not apply the loss scale of float16: call engine.backward(loss)")
        if boundary and not self._sent:
            raise RuntimeError(
                f"the gradients of {passes} micro-batches were not reduced, because the last backward pass ran within "
                "no_sync(): run the last one of each optimizer step outside, or drop the gradients with zero_grad()"
            )
        return passes

    def _update(self, scale: float) -> tuple[bool, GradNorm]:
        """Update the parameters, unless the gradients are not finite: then True is returned."""
        with record_function("ds.step"):
            norm = self._sharded.grad_norm()
            value = norm.value / scale
            skipped = not math.isfinite(value) and self._policy.skip_not_finite
            if skipped:
                self._sharded.drop_gradients()
            else:
                self._sharded.step(self._clip_factor(value) / scale)
        return skipped, norm

    def _clip_factor(self, norm: float) -> float:
        clip = self._policy.clip
        # the small number is torch.nn.utils.clip_grad_norm_'s, which this equals
        return min(1.0, clip / (norm + 1e-6)) if clip else 1.0

    def _after_step(self, *, skipped: bool, culprit: str | None) -> None:
        counters = self._counters
        self._counters = counters._replace(
            global_steps=counters.global_steps + 1,
            skipped_steps=counters.skipped_steps + skipped,
            skips_in_a_row=counters.skips_in_a_row + 1 if skipped else 0,
        )
        where = "the norm of the gradients" if culprit is None else f"the gradient of {culprit}"
        if skipped:
            self._report_skip(f"{where} is not finite")
        elif self.lr_scheduler is not None:
            self._step_schedule(self.lr_scheduler)
        if self._scale.window:  # dynamic
            try:
                self._scale = loss_scale.update(self._scale, skipped)
            except RuntimeError as error:
                raise RuntimeError(f"{where} is not finite: {error}") from None

    def _step_schedule(self, schedule: LearningRateSchedule) -> None:
        if self.optimizer is not None:
            # torch's schedules leave this mark in the optimizer's step(), which an update in one pass does not call
            vars(self.optimizer)["_opt_called"] = True
        schedule.step()

    def _report_skip(self, where: str) -> None:
        if self._counters.skips_in_a_row > self._policy.max_skips:
            raise RuntimeError(
                f"{where}, and {self._counters.skips_in_a_row} optimizer steps in a row were left out for that reason: "
                "lower the learning rate, or look at the data and at the operations of that parameter"
            )
        if self._policy.rank == 0:
            logger.warning(
                "optimizer step %d is left out: %s (loss scale %g)",
                self._counters.global_steps,
                where,
                self._scale.scale,
            )


@contextmanager
def keyed_randomness(seed: int, index: int, repeat: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from streams that depend on the arguments only; see [Note: Keyed randomness].

    Example:
        >>> with keyed_randomness(1, 17, 0, torch.device("cpu")):
        ...     first = torch.rand(2)
        >>> _ = torch.rand(3)
        >>> with keyed_randomness(1, 17, 0, torch.device("cpu")):
        ...     bool((torch.rand(2) == first).all())
        True
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    # hashed, so that neighbouring keys start unrelated streams
    key = hashlib.blake2b(f"{seed} {index} {repeat}".encode(), digest_size=8).digest()
    for generator in generators:
        generator.manual_seed(int.from_bytes(key, "little", signed=True))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in nested tuples, lists and dicts."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)
