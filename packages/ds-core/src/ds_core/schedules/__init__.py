"""Learning rate schedules under DeepSpeed's names, and the object that applies one."""

from .formulas import (
    SCHEDULES,
    LRRangeTest,
    OneCycle,
    Schedule,
    Values,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)
from .scheduler import NotSteppedError, Scheduler

__all__ = [
    "SCHEDULES",
    "LRRangeTest",
    "NotSteppedError",
    "OneCycle",
    "Schedule",
    "Scheduler",
    "Values",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
]
