"""Pipeline schedules as data: generated, validated, simulated, drawn."""

from .build import make_greedy_schedule, make_schedule
from .costs import Costs
from .instruction import Instruction, Op, Value
from .schedule import Schedule
from .simulate import Timeline, simulate
from .validate import ScheduleError, peak_bytes, validate

__all__ = [
    "Costs",
    "Instruction",
    "Op",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "Value",
    "make_greedy_schedule",
    "make_schedule",
    "peak_bytes",
    "simulate",
    "validate",
]
