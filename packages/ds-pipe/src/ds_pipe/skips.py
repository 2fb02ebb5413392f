"""Values that a stage gives to a later one past the stages between.

[Note: Skips]
A *skip* leaves its ``source`` stage and is used by its ``target`` stage; its gradient goes straight back. A *constant*
one is the same for all micro-batches of a step, as a weight is: ``LEND`` of the source writes it once, ``RETURN`` of
the target frees it, and every micro-batch has a gradient of it. Skips have names of their own in a schedule; a value
for two stages is two skips.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NAME = r"[^\s,:<>=]+"
"""What a skip may be called, as a regular expression."""

_SKIP = re.compile(rf"(\d+)([>=])(\d+):({NAME})")


class Skip(NamedTuple):
    """See [Note: Skips].

    Prints as ``0>3:name``, a constant one as ``0=3:name``.

    Example:
        >>> str(Skip(0, 3, "residual")), str(Skip(0, 3, "embedding", constant=True))
        ('0>3:residual', '0=3:embedding')
    """

    source: int
    target: int
    name: str
    constant: bool = False

    def __str__(self) -> str:
        return f"{self.source}{'=' if self.constant else '>'}{self.target}:{self.name}"


def checked(skips: Iterable[tuple[int, int, str] | Skip], num_stages: int) -> tuple[Skip, ...]:
    """Return the skips of a pipeline.

    Raises:
        ValueError: One goes backwards or out of the pipeline, or two have one name.
    """
    found: dict[str, Skip] = {}
    for skip in (Skip(*each) for each in skips):
        if not 0 <= skip.source < skip.target < num_stages:
            raise ValueError(f"skip {skip}: from a stage to a later one of the stages 0 ... {num_stages - 1}")
        if not re.fullmatch(NAME, skip.name):
            raise ValueError(f"skip {skip.name!r}: a name is some characters, without blanks and ',:<>='")
        if skip.name in found:
            raise ValueError(f"skips {found[skip.name]} and {skip}: each needs a name of its own")
        found[skip.name] = skip
    return (*found.values(),)


def parse_skips(text: str) -> tuple[Skip, ...]:
    """Return the skips that print as ``text``, with commas between them.

    Raises:
        ValueError: Something in it is no skip.

    Example:
        >>> parse_skips("0>3:residual,0=3:embedding")[1]
        Skip(source=0, target=3, name='embedding', constant=True)
    """
    matches = [(part, _SKIP.fullmatch(part)) for part in text.split(",")]
    wrong = [part for part, match in matches if match is None]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no skip; one reads 0>3:name, or 0=3:name if it is constant")
    groups = [match.groups() for _, match in matches if match]
    return tuple(Skip(int(source), int(target), name, arrow == "=") for source, arrow, target, name in groups)


def leaving(skips: Sequence[Skip], stage: int) -> list[Skip]:
    """Return the skips that ``stage`` hands out."""
    return [skip for skip in skips if skip.source == stage]


def entering(skips: Sequence[Skip], stage: int) -> list[Skip]:
    """Return the skips that ``stage`` takes in."""
    return [skip for skip in skips if skip.target == stage]
