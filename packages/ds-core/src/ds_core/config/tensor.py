"""DeepSpeed's spellings of tensor parallelism, as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..protocols import Json

SECTION = "tensor_parallel"
_SIZE = "autotp_size"
_NESTED = ("tp", "tensor_parallel")
_OFF = "the feature is off"


def as_one_size(raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return a configuration whose section ``tensor_parallel`` says the number of ranks as ``autotp_size`` only.

    Raises:
        ValueError: Two keys say different ones.

    Example:
        >>> as_one_size({"tensor_parallel": {"autotp_size": 0, "tp": {"tp_size": 2, "tp_grain_size": 1}}})
        {'tensor_parallel': {'tp': {'tp_grain_size': 1}, 'autotp_size': 2}}
    """
    section = raw.get(SECTION)
    if not isinstance(section, Mapping):
        return dict(raw)
    kept: dict[str, Json] = {key: value for key, value in section.items() if value not in (None, "auto")}
    said = {f"{SECTION}.{_SIZE}": kept.pop(_SIZE, None)}
    for key in _NESTED:
        nested = kept.get(key)
        if isinstance(nested, Mapping):
            said[f"{SECTION}.{key}.tp_size"] = nested.get("tp_size")
            kept[key] = {inner: value for inner, value in nested.items() if inner != "tp_size"}
    asking = {path: value for path, value in said.items() if value not in (None, "auto") and not _is_off(value)}
    if len({repr(value) for value in asking.values()}) > 1:
        both = " and ".join(f"{path} = {value!r}" for path, value in asking.items())
        raise ValueError(f"{both} each say how many ranks a layer is split over; keep one")
    if asking:
        kept[_SIZE] = next(iter(asking.values()))
    return {**raw, SECTION: kept}


def without_idle(kept: Mapping[str, Json], no_effect: dict[str, str]) -> dict[str, Json]:
    """Return a configuration without a section ``tensor_parallel`` that splits nothing; its keys have no effect.

    Example:
        >>> notes = {}
        >>> without_idle({"tensor_parallel": {"preset_model": "llama"}}, notes), notes
        ({}, {'tensor_parallel.preset_model': 'the feature is off'})
    """
    section = kept.get(SECTION)
    if not isinstance(section, Mapping) or _SIZE in section or section.get("blocks") not in (None, 1):
        return dict(kept)
    no_effect.update({f"{SECTION}.{key}": _OFF for key in section if key != "name"})
    return {key: value for key, value in kept.items() if key != SECTION}


def num_tensor_ranks(raw: Mapping[str, Json]) -> int:
    """Return over how many ranks layers are split.

    Raises:
        ValueError: That is no number.

    Example:
        >>> num_tensor_ranks({"tensor_parallel": {"tp": {"tp_size": 4}}})
        4
    """
    section: Any = as_one_size(raw).get(SECTION)
    number = section.get(_SIZE, 1) if isinstance(section, Mapping) else 1
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{SECTION}.{_SIZE} must be a positive number of ranks; got {number!r}")
    return number


def _is_off(value: Json) -> bool:
    return value in (0, 1) and not isinstance(value, bool)
