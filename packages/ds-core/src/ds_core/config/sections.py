"""The sections of a configuration and the whole of it, as frozen values.

Keys, meanings and defaults are DeepSpeed's wherever the meaning is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from ..schedules import Schedule

if TYPE_CHECKING:
    from ..protocols import Json, Plugin


_MAX_SCALE_POWER = 127  # the scaled loss is float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp16:
    """Training in float16 with a loss scale."""

    enabled: bool = False
    """Whether forward and backward run in float16."""
    auto_cast: bool = False
    """Whether floating-point inputs of the model are cast to float16."""
    loss_scale: float = 0.0
    """Factor on the loss; 0 finds it dynamically, which suits most models."""
    initial_scale_power: int = 16
    """Exponent of two that the dynamic scale starts from: 2 ** 16 is near the largest float16."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the dynamic scale doubles."""
    hysteresis: int = 2
    """Overflows it takes to halve the dynamic scale, so that one stray overflow does not."""
    consecutive_hysteresis: bool = False
    """Whether each step without overflow restores the hysteresis, not only a full window."""
    min_loss_scale: int = 1
    """Smallest dynamic scale; an overflow there ends the run."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.loss_scale) and self.loss_scale >= 0):
            raise ValueError(f"loss_scale must be finite and >= 0 (0 is dynamic), got {self.loss_scale}")
        # The others are read by a dynamic scale only; DeepSpeed's files carry them along in any case.
        if not self.enabled or self.loss_scale:
            return
        for name, value in (
            ("loss_scale_window", self.loss_scale_window),
            ("hysteresis", self.hysteresis),
            ("min_loss_scale", self.min_loss_scale),
        ):
            if value <= 0:
                raise ValueError(f"{name} must be positive for a dynamic loss scale, got {value}")
        if not 0 <= self.initial_scale_power <= _MAX_SCALE_POWER:
            raise ValueError(
                f"initial_scale_power must be between 0 and {_MAX_SCALE_POWER}, the exponent of the largest float32, "
                f"got {self.initial_scale_power}"
            )
        if 2.0**self.initial_scale_power < self.min_loss_scale:
            raise ValueError(
                f"min_loss_scale = {self.min_loss_scale} must not be above the scale to start from, "
                f"2 ** initial_scale_power = {2.0**self.initial_scale_power:g}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bf16:
    """Training in bfloat16, which needs no loss scale."""

    enabled: bool = False
    """Whether forward and backward run in bfloat16."""
    auto_cast: bool = False
    """Whether floating-point inputs of the model are cast to bfloat16."""
    check_grad_overflow: bool = True
    """Whether a step whose gradients are not finite is skipped, as float16 does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataTypes:
    """Data types beside those of forward and backward."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What summed gradients are kept in until the step; fp32 loses nothing."""
    keep_in_fp32_modules: tuple[str, ...] = ()
    """Modules that stay in float32 under bf16 and fp16: names of classes, or parts of qualified names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCheckpointing:
    """Activations that are recomputed in the backward pass, and how the inputs for that are kept until then."""

    blocks: bool = False
    """Whether each block of the model (see ``unit_classes``) is recomputed, with no change to the model. Without, the
    model calls a :class:`ds_core.Checkpointer` itself."""
    partition_activations: bool = False
    """Whether each rank of a model-parallel group keeps its part of a saved input only."""
    cpu_checkpointing: bool = False
    """Whether saved inputs wait in host memory, pinned where the model is on a GPU. On CPU that is where they are."""
    contiguous_memory_optimization: bool = False
    """Whether saved inputs are copied into buffers that are allocated once."""
    number_checkpoints: int = 8
    """Saved inputs that one such buffer holds, usually the number of layers. There may be several."""
    synchronize_checkpoint_boundary: bool = False
    """Whether the GPU's work is waited for before and after each recomputed function, for timing."""
    profile: bool = False
    """Whether torch.profiler shows ranges ``ds.activations.forward`` and ``ds.activations.recompute``."""

    def __post_init__(self) -> None:
        if self.number_checkpoints <= 0:
            raise ValueError(f"number_checkpoints must be positive, got {self.number_checkpoints}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Which implementation of the fused kernels is used."""

    backend: str = "auto"
    """Name of an installed plugin of the group ``ds.kernels``; ``auto`` takes the best one that runs here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A plugin that the configuration selects, with its settings."""

    name: str
    """What the configuration calls it."""
    params: Mapping[str, Json] = field(compare=False)
    """Its settings, as the configuration has them: defaults left out, so no basis for a comparison."""
    plugin: Plugin
    """The plugin."""
    config: object
    """Its settings, as it wants them: an instance of ``plugin.config_type``, or None where it has none."""
    note: str = ""
    """What was chosen, where the configuration left it open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All that a run is configured with. Made by :func:`ds_core.config.parse`."""

    train_batch_size: int
    """Samples of one optimizer step, on all ranks."""
    train_micro_batch_size_per_gpu: int
    """Samples of one forward pass, on one rank."""
    gradient_accumulation_steps: int
    """Forward passes of one optimizer step, on one rank."""
    optimizer: Choice | None = None
    """The optimizer; None where the caller passes one, or does not train."""
    scheduler: Schedule | None = None
    """The learning rate schedule; None keeps the optimizer's learning rate, or leaves it to the caller."""
    gradient_clipping: float = 1.0
    """Largest norm of the gradient, above which it is scaled down; 0 leaves it alone."""
    fp16: Fp16 = field(default_factory=Fp16)
    """Training in float16."""
    bf16: Bf16 = field(default_factory=Bf16)
    """Training in bfloat16."""
    data_types: DataTypes = field(default_factory=DataTypes)
    """Other data types."""
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    """Activations recomputed in the backward pass."""
    dataloader_drop_last: bool = False
    """Whether the data loader drops a last batch that is not full."""
    seed: int = 1234
    """Key of all random numbers of training; the default is that of DeepSpeed's data sampling."""
    kernels: Kernels = field(default_factory=Kernels)
    """The fused kernels."""
    plugins: Mapping[str, Choice] = field(default_factory=dict)
    """Other plugins selected, by role: ``partitioner``, ``collectives``."""
    no_effect: Mapping[str, str] = field(default_factory=dict)
    """Keys of the configuration that have no effect here, each with the reason."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Keys that were left to this wheel (``"auto"``), each with what was chosen."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gradient_clipping) and self.gradient_clipping >= 0):
            raise ValueError(f"gradient_clipping must be finite and >= 0 (0 is off), got {self.gradient_clipping}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


ROLE_GROUPS: Mapping[str, str] = {
    "partitioner": "ds.partitioner",
    "collectives": "ds.collectives",
    "pipeline": "ds.pipeline",
    "tensor_parallel": "ds.tensor",
}
"""Sections that select a plugin by ``{"name": ..., <its settings>}``, each with the plugin's group. The roles that
are not composed yet stand in ``unavailable.py``."""

DEFAULT_NAMES: Mapping[str, str] = {"pipeline": "pipe", "tensor_parallel": "tensor"}
"""The plugin that a section selects which does not name one."""

ZERO = "zero_optimization"
"""DeepSpeed's name for the section of the partitioner ``zero``."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""The sizes of the batch rule, in the order of :class:`ds_core.config.Batch`."""

RESULTS = frozenset({"plugins", "no_effect", "chosen"})
"""Fields of :class:`Config` that are no keys of a file."""

OWNED = frozenset(each.name for each in fields(Config)) - RESULTS | {ZERO}
"""Keys of a file that become a field of :class:`Config`, and the partitioner's section."""

SELECTING = frozenset({"optimizer", "scheduler", ZERO})
"""Those of them that select something, and are not just values."""
