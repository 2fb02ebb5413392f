"""Pipelines: schedules as data, generated, validated, simulated, drawn, and run."""

from .alarm import PipelineError
from .build import make_greedy_schedule, make_schedule
from .costs import Costs
from .model import PipelineModule
from .pipeline import Pipeline
from .schedule import Schedule
from .simulate import Timeline, simulate
from .validate import ScheduleError, peak_bytes, validate

__all__ = [
    "Costs",
    "Pipeline",
    "PipelineError",
    "PipelineModule",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "make_greedy_schedule",
    "make_schedule",
    "peak_bytes",
    "simulate",
    "validate",
]
