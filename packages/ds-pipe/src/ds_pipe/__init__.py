"""Pipelines: schedules as data, generated, validated, simulated, drawn, and run."""

from .build import make_greedy_schedule, make_schedule
from .costs import Costs
from .layers import LayerSpec, TiedLayerSpec
from .model import PipelineModule
from .pipeline import Pipeline
from .schedule import Schedule
from .simulate import simulate
from .validate import ScheduleError, peak_bytes, validate

__all__ = [
    "Costs",
    "LayerSpec",
    "Pipeline",
    "PipelineModule",
    "Schedule",
    "ScheduleError",
    "TiedLayerSpec",
    "make_greedy_schedule",
    "make_schedule",
    "peak_bytes",
    "simulate",
    "validate",
]
