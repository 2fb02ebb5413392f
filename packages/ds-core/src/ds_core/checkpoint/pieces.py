"""Intervals of a flattened tensor: cutting, intersecting, and whether they cover it exactly once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar


class Interval(NamedTuple):
    """Elements ``start <= i < end`` of a row-major flattened tensor."""

    start: int
    end: int

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


class Bounded(Protocol):
    """Anything that stands for an interval."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def end(self) -> int:
        """One past the last element."""


BoundedT = TypeVar("BoundedT", bound=Bounded)


class Fault(NamedTuple):
    """Elements that do not stand exactly once."""

    interval: Interval
    missing: bool  # True: in no piece; False: in more than one


def cut(whole: Bounded, step: int) -> Iterator[Interval]:
    """Yield consecutive intervals of at most ``step`` elements that make up ``whole``; none if it is empty.

    Example:
        >>> [str(part) for part in cut(Interval(3, 10), 4)]
        ['[3, 7)', '[7, 10)']
    """
    for start in range(whole.start, whole.end, step):
        yield Interval(start, min(start + step, whole.end))


def intersect(a: Bounded, b: Bounded) -> Interval:
    """Return the elements in both; an interval whose end is not above its start when there are none.

    Example:
        >>> str(intersect(Interval(0, 8), Interval(5, 20)))
        '[5, 8)'
    """
    return Interval(max(a.start, b.start), min(a.end, b.end))


def touching(pieces: Sequence[BoundedT], wanted: Interval) -> Iterator[BoundedT]:
    """Yield the pieces that share elements with ``wanted``.

    Args:
        pieces: Sorted, without gaps or overlaps.
        wanted: The elements asked for.

    Yields:
        The pieces, in order; found in time logarithmic in their number.

    Example:
        >>> [str(p) for p in touching([Interval(0, 4), Interval(4, 6), Interval(6, 9)], Interval(5, 7))]
        ['[4, 6)', '[6, 9)']
    """
    if wanted.start >= wanted.end:
        return
    first = bisect_right(pieces, wanted.start, key=lambda piece: piece.start) - 1
    for index in range(first, len(pieces)):
        if pieces[index].start >= wanted.end:
            return
        yield pieces[index]


def faults(pieces: Iterable[Bounded], numel: int) -> list[Fault]:
    """Return where the pieces do not cover ``[0, numel)`` exactly once.

    Example:
        >>> [(str(f.interval), f.missing) for f in faults([Interval(0, 4), Interval(3, 5)], 8)]
        [('[3, 4)', False), ('[5, 8)', True)]
    """
    found = []
    covered = 0
    for piece in sorted(pieces, key=lambda piece: (piece.start, piece.end)):
        if piece.start > covered:
            found.append(Fault(Interval(covered, piece.start), missing=True))
        elif piece.start < min(covered, piece.end):
            found.append(Fault(Interval(piece.start, min(covered, piece.end)), missing=False))
        covered = max(covered, piece.end)
    if covered < numel:
        found.append(Fault(Interval(covered, numel), missing=True))
    return found
