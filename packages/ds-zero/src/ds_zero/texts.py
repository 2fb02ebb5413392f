"""Words of messages."""

from __future__ import annotations

from collections.abc import Iterable

_MAX_SHOWN = 8


def shown(items: Iterable[str], *, limit: int = _MAX_SHOWN, between: str = ", ") -> str:
    """Return the first ``limit`` of ``items``, and how many there are besides.

    Example:
        >>> shown("abc"), shown("abc", limit=1)
        ('a, b, c', 'a and 2 more')
    """
    known = list(items)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return between.join(known[:limit]) + more
