"""The key ``compression``: codes of gradients by measured links, a short form of the section ``collectives``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..protocols import Json


def as_section(raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return a configuration in which the key ``compression`` stands as the section ``collectives``.

    Raises:
        ValueError: If its value is neither ``"auto"`` nor an object with the key ``auto`` alone, or there is such a
            section besides.

    Example:
        >>> as_section({"compression": {"auto": {"step_seconds": 0.5}}})
        {'collectives': {'name': 'compressed', 'auto': {'step_seconds': 0.5}}}
    """
    given = {key: value for key, value in raw.items() if key != "compression"}
    asked = raw.get("compression")
    if asked is None:
        return given
    whole = {"auto": {}} if asked == "auto" else asked
    if not isinstance(whole, Mapping) or set(whole) != {"auto"} or not isinstance(whole["auto"], Mapping):
        raise ValueError(
            f"compression must be 'auto', or an object as {{'auto': {{'step_seconds': 0.5}}}}; got {asked!r}"
        )
    if given.get("collectives") is not None:
        raise ValueError(
            f"compression = {asked!r} and collectives = {given['collectives']!r} both say how ranks communicate; keep "
            "one of them"
        )
    return {**given, "collectives": {"name": "compressed", "auto": dict(whole["auto"])}}
