"""A schedule and a cut in a file, from planning to training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .schedule import Schedule


class Planned(NamedTuple):
    """What a run needs of a plan."""

    schedule: Schedule
    bounds: Sequence[int]  # where layers are cut into stages


def write_plan(path: Path, schedule: Schedule, bounds: Sequence[int]) -> None:
    """Write a schedule and a cut."""
    path.write_text(
        json.dumps({"bounds": [*bounds], "schedule": str(schedule).splitlines()}, indent=1), encoding="utf-8"
    )


def read_plan(path: Path) -> Planned:
    """Return what :func:`write_plan` wrote.

    Raises:
        ValueError: The file holds something else.

    Example:
        >>> import tempfile
        >>> from .build import make_schedule
        >>> schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_plan(Path(folder, "a.plan.json"), schedule, [0, 3, 4])
        ...     read_plan(Path(folder, "a.plan.json")) == (schedule, [0, 3, 4])
        True
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        bounds = [int(bound) for bound in read["bounds"]]
        return Planned(Schedule.parse("\n".join(read["schedule"])), bounds)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no plan that 'ds pipe plan --out' wrote: {error}") from error
