"""The training engine: forward, backward, step, and what they count.

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

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from . import loss_scale
from ._log import logger

if TYPE_CHECKING:
    import os

    from .data import TrainLoader
    from .loss_scale import LossScale
    from .protocols import Json, LearningRateSchedule, Sharded
    from .saving import Vault


class StepOutcome(NamedTuple):
    """What a call of :meth:`Engine.step` did."""

    boundary: bool  # whether it ended an optimizer step; if not, the rest is as of the last one that did
    skipped: bool  # whether the update was left out because gradients were not finite
    grad_norm: float | None  # L2 norm of the mean gradient before clipping; None before the first step
    loss_scale: float  # that the micro-batches of this step ran with


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPolicy:
    """How the engine runs a step; fixed for its life."""

    train_batch_size: int
    """Samples of one optimizer step, on all ranks."""
    micro_batch_size: int
    """Samples of one forward pass on one rank."""
    accumulation: int
    """Forward passes of one optimizer step on one rank."""
    device: torch.device
    """Where the model is."""
    rank: int = 0
    """This rank among those that share the data."""
    num_ranks: int = 1
    """Ranks that share the data."""
    clip: float = 0.0
    """Largest norm of the mean gradient; 0 leaves it alone."""
    skip_not_finite: bool = True
    """Whether a step whose gradients are not finite is left out."""
    max_skips: int = 100
    """Steps in a row that may be left out before the run ends."""
    cast_inputs: torch.dtype | None = None
    """Data type that floating-point inputs of the model are cast to."""
    seed: int = 0
    """Key of random numbers in the forward pass."""


class Counters(NamedTuple):
    """How far training has come; saved in checkpoints."""

    global_steps: int = 0  # optimizer steps, skipped ones included
    micro_steps: int = 0  # micro-batches on this rank
    skipped_steps: int = 0  # optimizer steps left out
    skips_in_a_row: int = 0  # of them, without one that was made in between


class Engine:
    """Trains a partitioned model. Made by :func:`ds_core.initialize`.

    Example:
        A loop over micro-batches; ``step`` updates at the end of each optimizer step and is cheap otherwise::

            for batch in dataloader:
                loss = engine(batch)
                engine.backward(loss)
                engine.step()
    """

    def __init__(
        self,
        sharded: Sharded,
        policy: StepPolicy,
        *,
        scale: LossScale,
        vault: Vault,
        lr_scheduler: LearningRateSchedule | None = None,
        training_dataloader: TrainLoader | None = None,
    ) -> None:
        self.module: nn.Module = sharded.module
        self.optimizer = sharded.optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = training_dataloader
        self._sharded = sharded
        self._policy = policy
        self._scale = scale
        self._vault = vault
        self._counters = Counters()
        self._outcome = StepOutcome(boundary=False, skipped=False, grad_norm=None, loss_scale=scale.scale)
        self._boundary: bool | None = None  # what set_gradient_accumulation_boundary said; None: count
        self._forwards = 0  # of the current micro-batch
        self._pending = 0  # micro-batches whose gradients wait for an update

    # Training, in the order of a step #

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass; in training, with random numbers keyed by the global micro-batch."""
        policy = self._policy
        if policy.cast_inputs is not None:
            args, kwargs = _cast((args, kwargs), policy.cast_inputs)
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

        The loss is this micro-batch's mean: the engine averages over micro-batches and ranks.
        """
        if loss.numel() != 1:
            raise ValueError(f"backward() takes a scalar loss, got shape {list(loss.shape)}: reduce it with .mean()")
        # float32: a float16 loss would overflow under the scale
        scaled = loss if self._scale.scale == 1.0 else loss.float() * self._scale.scale
        with record_function("ds.backward"):
            scaled.backward()
        return loss

    def step(self) -> StepOutcome:
        """Count one micro-batch; after the last one of an optimizer step, update the parameters.

        Returns:
            What was done.

        Raises:
            RuntimeError: Too many steps in a row had gradients that are not finite, or the loss scale cannot go
                lower; the text names the first parameter concerned.
        """
        boundary = self.is_gradient_accumulation_boundary()
        self._forwards = 0
        self._pending = 0 if boundary else self._pending + 1
        self._counters = self._counters._replace(micro_steps=self._counters.micro_steps + 1)
        if not boundary:
            self._outcome = self._outcome._replace(boundary=False)
            return self._outcome
        scale = self._scale.scale
        with record_function("ds.step"):
            norm = self._sharded.grad_norm()
            value = norm.value / scale
            skipped = not math.isfinite(value) and self._policy.skip_not_finite
            self._sharded.step(None if skipped else self._clip_factor(value) / scale)
        self._outcome = StepOutcome(boundary=True, skipped=skipped, grad_norm=value, loss_scale=scale)
        self._after_step(skipped=skipped, culprit=norm.culprit)
        return self._outcome

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of its optimizer step."""
        if self._boundary is not None:
            return self._boundary
        return (self._counters.micro_steps + 1) % self._policy.accumulation == 0

    def set_gradient_accumulation_boundary(self, *, is_boundary: bool) -> None:
        """Say whether the next :meth:`step` updates, instead of counting micro-batches."""
        self._boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block, backward passes add gradients up on each rank and send nothing.

        Saves communication and costs memory for whole gradients; see ``set_sync`` of the partitioner.
        """
        self._sharded.set_sync(enabled=False)
        try:
            yield
        finally:
            self._sharded.set_sync(enabled=True)

    def zero_grad(self) -> None:
        """Drop all gradients since the last optimizer step, on every rank."""
        self._pending = 0
        self._sharded.step(None)

    def train(self, mode: bool = True) -> Engine:  # noqa: FBT001, FBT002 - torch's signature
        """Switch the model between training and evaluation."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Switch the model to evaluation."""
        return self.train(mode=False)

    # Checkpoints #

    def save_checkpoint(
        self, save_dir: str | os.PathLike[str], tag: str | None = None, client_state: Mapping[str, Json] | None = None
    ) -> str:
        """Save everything needed to go on, on any number of ranks at any stage; all ranks call it.

        Args:
            save_dir: Holds one folder per checkpoint; seen by all ranks.
            tag: Name of the folder; None: ``global_step<n>``.
            client_state: JSON values of the caller's, returned by :meth:`load_checkpoint`.

        Returns:
            The checkpoint's folder.

        Raises:
            ValueError: The tag exists, or ``client_state`` is not JSON.
        """
        if self._pending:
            raise RuntimeError(
                f"save_checkpoint() within an optimizer step: the gradients of {self._pending} micro-batches would be "
                "lost; save after a step() that updated (StepOutcome.boundary), or drop them with zero_grad()"
            )
        counters = self._counters._replace(micro_steps=self._counters.micro_steps * self._policy.num_ranks)
        run: dict[str, Json] = {
            "counters": counters._asdict(),
            "loss_scale": self._scale._asdict(),
            "lr_scheduler": None if self.lr_scheduler is None else dict(self.lr_scheduler.state_dict()),
            "data": None if self.training_dataloader is None else self.training_dataloader.state_dict(),
            "client_state": dict(client_state or {}),
        }
        return self._vault.save(save_dir, tag or f"global_step{self.global_steps}", self._sharded.state(), run)

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
    ) -> tuple[str, dict[str, Any]]:
        """Go on from a checkpoint, whatever number of ranks and stage wrote it; all ranks call it.

        Nothing is changed before the whole checkpoint has been verified and found to fit.

        Args:
            load_dir: Where it was saved.
            tag: Which one; None: the last good one.
            load_module_strict: Whether tensors that only one side has are errors.
            load_optimizer_states: Whether to load more than parameters and buffers.
            load_lr_scheduler_states: Whether to load the schedule.

        Returns:
            The checkpoint's folder, and the caller's own state.

        Raises:
            CheckpointError: It is damaged; the text names file and tensor.
            ValueError: It does not fit the model or the optimizer.
        """
        opened = self._vault.open(load_dir, tag, self._sharded.state().shapes, strict=load_module_strict)
        run: Mapping[str, Any] = opened.run
        self._sharded.load_state(opened, optimizer=load_optimizer_states)
        counters = Counters(**run["counters"])  # micro-batches of all ranks, whose number may have changed
        self._counters = counters._replace(micro_steps=counters.micro_steps // self._policy.num_ranks)
        self._scale = loss_scale.LossScale(**run["loss_scale"])
        if load_lr_scheduler_states and self.lr_scheduler is not None and run["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(run["lr_scheduler"])
        if self.training_dataloader is not None and run["data"] is not None:
            self.training_dataloader.load_state_dict(run["data"])
        return str(opened.path), dict(run["client_state"])

    # Properties #

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self._counters.global_steps

    @property
    def counters(self) -> Counters:
        """How far training has come."""
        return self._counters

    @property
    def policy(self) -> StepPolicy:
        """Batch sizes and the like."""
        return self._policy

    @property
    def last_outcome(self) -> StepOutcome:
        """What the last :meth:`step` returned."""
        return self._outcome

    # Helpers #

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
        if skipped:
            self._report_skip(culprit)
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self._scale.window:  # dynamic
            self._scale = loss_scale.update(self._scale, skipped)

    def _report_skip(self, culprit: str | None) -> None:
        where = f"the gradient of {culprit} is not finite"
        if self._counters.skips_in_a_row > self._policy.max_skips:
            raise RuntimeError(
                f"{where}, and {self._counters.skips_in_a_row} optimizer steps in a row were left out for that reason: "
                "lower the learning rate, or look at the data and at the operations of that parameter"
            )
        if self._policy.rank == 0:
            logger.warning(
                "optimizer step %d is left out: %s (loss scale %g)", self.global_steps, where, self._scale.scale
            )


@contextmanager
def keyed_randomness(seed: int, index: int, repeat: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from streams that depend on the arguments only.

    Args:
        seed: Of the run.
        index: Global index of the micro-batch.
        repeat: Forward passes of this micro-batch before this one.
        device: Where the model is; its generator and the CPU's are keyed.

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
    for generator in generators:
        generator.manual_seed(_mix(seed, index, repeat))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _mix(*numbers: int) -> int:
    """Hash integers into 63 bits, so that neighbouring keys start unrelated streams.

    The mixing step is SplitMix64's (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014).
    """
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & ((1 << 63) - 1)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in nested tuples, lists and dicts."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)
