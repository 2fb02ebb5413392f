"""DeepSpeed's keys of collectives in fewer bits, which select a plugin here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .check import unknown_key
from .sections import ZERO

if TYPE_CHECKING:
    from ..protocols import Json

_SETTINGS: Mapping[str, Mapping[str, Json]] = {
    "zero_quantized_weights": {"weights": "int8"},
    "zero_quantized_gradients": {"gradients": "int4"},
}
"""Key below ``zero_optimization``, and what it sets in the section ``collectives``."""

_LOCO = "zeropp_loco_param"
_LOCO_KEYS: Mapping[str, tuple[str, Json]] = {"err_beta": ("error_beta", 0.8), "reset_T": ("error_reset", 1024)}
"""Key below ``zeropp_loco_param``, what it is called in the section ``collectives``, and its default."""

_DTYPE = "communication_data_type"
_DTYPES = ("fp32", "fp16", "bf16")


def as_collectives(raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return a configuration in which DeepSpeed's keys stand as the section ``collectives``.

    ``communication_data_type`` stays where it has no effect: gradients of that type travel in it anyway, and no sum
    of lower ones is more exact for being sent in float32.

    Raises:
        ValueError: If a value is none of those possible, two keys say how gradients travel, or there is such a section
            besides.

    Example:
        >>> as_collectives({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}})
        {'zero_optimization': {'stage': 3}, 'collectives': {'name': 'compressed', 'weights': 'int8'}}
        >>> as_collectives({"communication_data_type": "bf16"})
        {'collectives': {'name': 'compressed', 'gradients': 'bf16', 'error_feedback': False}}
    """
    given, settings, asked = dict(raw), dict[str, "Json"](), []
    section = raw.get(ZERO)
    if isinstance(section, Mapping):
        given[ZERO] = {key: value for key, value in section.items() if key not in _SETTINGS and key != _LOCO}
        for key, value in section.items():
            if key in _SETTINGS and _is_on(f"{ZERO}.{key}", value):
                settings |= _SETTINGS[key]
                asked.append(f"{ZERO}.{key} = True")
        settings |= _loco(section.get(_LOCO), coded="gradients" in settings)
    dtype = _dtype(raw)
    if dtype is not None:
        asked.append(f"{_DTYPE} = {dtype!r}")
        if "gradients" in settings:
            raise ValueError(f"{' and '.join(asked[-2:])} both say how gradients travel; keep one")
        # as in DeepSpeed, what is rounded off is lost
        settings |= {"gradients": dtype, "error_feedback": False}
        del given[_DTYPE]
    if not asked:
        return given
    if raw.get("collectives") is not None:
        raise ValueError(
            f"{asked[0]} and collectives = {raw['collectives']!r} both say how ranks communicate; keep one"
        )
    return {**given, "collectives": {"name": "compressed", **settings}}


def _is_on(path: str, value: Json) -> bool:
    if value not in (None, "auto") and not isinstance(value, bool):
        raise ValueError(f"{path} must be true or false; got {value!r}")
    return value is True


def _loco(value: Json, *, coded: bool) -> dict[str, Json]:
    """Return the settings of errors that are averaged and dropped now and then."""
    path = f"{ZERO}.{_LOCO}"
    if value in (None, "auto"):
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must be an object with err_beta and reset_T; got {value!r}")
    for key, each in value.items():
        if key not in _LOCO_KEYS:
            raise ValueError(unknown_key(f"{path}.{key}", each, _LOCO_KEYS))
    if not coded:
        raise ValueError(
            f"{path} = {dict(value)} is about the errors of quantized gradients, which are off; set "
            f"{ZERO}.zero_quantized_gradients = true, or remove it"
        )
    return {name: value.get(key, default) for key, (name, default) in _LOCO_KEYS.items()}


def _dtype(raw: Mapping[str, Json]) -> str | None:
    """Return the data type that gradients are rounded to on their way; None: that in which they are computed."""
    value = raw.get(_DTYPE)
    if value in (None, "auto"):
        return None
    if not isinstance(value, str) or value not in _DTYPES:
        raise ValueError(f"{_DTYPE} must be one of {', '.join(_DTYPES)}, or null; got {value!r}")
    sections = {name: raw.get(name) for name in ("bf16", "fp16")}
    computed = [name for name, each in sections.items() if isinstance(each, Mapping) and each.get("enabled") is True]
    return None if value == "fp32" or value in computed else value
