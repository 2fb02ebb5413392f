"""Settings of a pipeline, as a configuration has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PipeConfig:
    """Settings of the plugin ``pipe``."""

    stages: int | Literal["auto"] | None = None
    """Ranks of one pipeline; None and ``auto``: as the model says, or all."""
    schedule: str | None = None
    """A fixed schedule: see :func:`ds_pipe.make_schedule`; None: ``1f1b``, where no file says otherwise."""
    chunks: int | None = None
    """Stages on each rank, for schedules that leave it open; None: as few as they can have."""
    schedule_file: str | None = None
    """A text file with a schedule to be used instead; see :class:`ds_pipe.Schedule`."""
    plan: str | None = None
    """A file of ``ds pipe plan --out``, ``PREFIX.plan.json``: its schedule and its cut are used."""
    activation_checkpoint_interval: int = 0
    """Layers whose input alone is kept, see :class:`ds_pipe.PipelineModule`; 0: as the model says."""
    replan: int | None = None
    """After so many steps, at least 3, a schedule is made for what they have cost, with the same stages on the same
    ranks, and used if it is predicted to be faster; see :class:`ds_pipe.replanning.Replanning`. None: never."""
    keep_freed_memory: bool = False
    """Let the process keep memory that it frees, see :func:`ds_pipe.host_memory.keep_freed_memory`; for the CPU."""
    timeout: float = 600.0
    """Seconds that a message may take before its receiver gives up."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")
        said = {"schedule": self.schedule, "schedule_file": self.schedule_file, "plan": self.plan}
        both = [f"{key} = {value!r}" for key, value in said.items() if value is not None]
        if len(both) > 1:
            raise ValueError(f"{' and '.join(both)} each say what the schedule is; keep one")
        if self.schedule == "forward_only":
            raise ValueError(
                "schedule = 'forward_only' has no backward passes: name one to train by; evaluations use its forwards"
            )
        if self.replan is not None and self.replan < 3:
            raise ValueError(f"replan must be at least 3 steps, of which one warms up; got {self.replan}")
        interval = self.activation_checkpoint_interval
        if interval < 0:
            raise ValueError(f"activation_checkpoint_interval must be a number of layers, or 0; got {interval}")
        if self.chunks is not None and self.chunks < 1:
            raise ValueError(f"chunks must be a positive number of stages, got {self.chunks}")
