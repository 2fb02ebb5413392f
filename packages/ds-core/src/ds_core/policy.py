"""How an engine runs a step, how far it has come, and what a step did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


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


class StepOutcome(NamedTuple):
    """What a call of ``Engine.step`` did."""

    boundary: bool  # whether it ended an optimizer step; if not, the rest is as of the last one that did
    skipped: bool  # whether the update was left out because gradients were not finite
    grad_norm: float | None  # L2 norm of the mean gradient before clipping; None before the first step
    loss_scale: float  # that the micro-batches of this step ran with
