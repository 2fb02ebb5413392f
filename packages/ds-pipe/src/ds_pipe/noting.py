"""Where an error has happened, noted on it on its way up."""

from __future__ import annotations


def note(error: Exception, text: str) -> None:
    """Add a note, as ``add_note`` of Python 3.11 does; from there on tracebacks show it.

    Args:
        error: Which is raised again.
        text: Where it was.
    """
    vars(error).setdefault("__notes__", []).append(text)


def told(error: Exception) -> str:
    """Return what an error says, and its notes.

    Example:
        >>> error = ValueError("no such luck")
        >>> note(error, "in layer 1 (Linear)")
        >>> told(error)
        'no such luck, in layer 1 (Linear)'
    """
    return ", ".join([str(error), *vars(error).get("__notes__", ())])
