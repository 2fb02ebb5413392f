"""DeepSpeed's keys of quantized collectives, which select a plugin here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .sections import ZERO

if TYPE_CHECKING:
    from ..protocols import Json

_SETTINGS: Mapping[str, Mapping[str, Json]] = {
    "zero_quantized_weights": {"weights": "int8"},
    "zero_quantized_gradients": {"gradients": "int4"},
}
"""Key below ``zero_optimization``, and what it sets in the section ``collectives``."""


def as_collectives(raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return a configuration in which DeepSpeed's keys stand as the section ``collectives``.

    Raises:
        ValueError: If a value is none of true, false, null and "auto", or there is such a section besides.

    Example:
        >>> as_collectives({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}})
        {'zero_optimization': {'stage': 3}, 'collectives': {'name': 'compressed', 'weights': 'int8'}}
    """
    section = raw.get(ZERO)
    if not isinstance(section, Mapping) or not section.keys() & _SETTINGS.keys():
        return dict(raw)
    asked = {key: value for key, value in section.items() if key in _SETTINGS}
    for key, value in asked.items():
        if value not in (None, "auto") and not isinstance(value, bool):
            raise ValueError(f"{ZERO}.{key} must be true or false; got {value!r}")
    given = {**raw, ZERO: {key: value for key, value in section.items() if key not in _SETTINGS}}
    on = [key for key, value in asked.items() if value is True]
    if not on:
        return given
    if raw.get("collectives") is not None:
        raise ValueError(
            f"{ZERO}.{on[0]} = True and collectives = {raw['collectives']!r} both say how ranks communicate; keep one"
        )
    settings = {name: code for key in on for name, code in _SETTINGS[key].items()}
    return {**given, "collectives": {"name": "compressed", **settings}}
