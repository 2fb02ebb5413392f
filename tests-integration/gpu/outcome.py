"""What a check may say besides passing and failing."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]
"""What a measurement returns: names with units, and numbers."""


class NotRun(Exception):  # noqa: N818 - no error: a part that this machine lacks
    """Raised by a check that cannot run here; says why."""
