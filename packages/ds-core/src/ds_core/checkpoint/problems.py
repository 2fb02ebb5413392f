"""The error that a damaged checkpoint raises, and how a long list of problems is told."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete, or of a format that this version cannot read."""


def listing(problems: Sequence[str], limit: int = 20) -> str:
    """Return one indented line per problem, at most ``limit``, then how many more there are.

    Example:
        >>> print(listing(["a is missing", "b is missing", "c is missing"], limit=2))
          a is missing
          b is missing
          ... and 1 more
    """
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)
