"""DeepSpeed's spellings of tensor parallelism, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..registry import did_you_mean

if TYPE_CHECKING:
    from ..protocols import Json

SECTION = "tensor_parallel"
_SIZE = "autotp_size"
_SIZES = (_SIZE, "tp_size")  # the second one is that of DeepSpeed's inference
_SWITCH = "enabled"
_NESTED = ("tp", "tensor_parallel")
_QUIET = {*_NESTED, "name", "dtype", "keep_module_on_host", "tp_overlap_comm", "vocab_parallel_ce_backend"}
_OFF = "the feature is off"
_SAY = f"say over how many ranks layers are split, {SECTION}.{_SIZE}, or 0 for none"


def as_one_size(raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return a configuration whose section ``tensor_parallel`` says the number of ranks as ``autotp_size`` only.

    Raises:
        ValueError: Two keys say different ones; or none does, and the section asks for something.

    Example:
        >>> as_one_size({"tensor_parallel": {"autotp_size": 0, "tp": {"tp_size": 2, "tp_grain_size": 1}}})
        {'tensor_parallel': {'tp': {'tp_grain_size': 1}, 'autotp_size': 2}}
    """
    section = raw.get(SECTION)
    if not isinstance(section, Mapping):
        return dict(raw)
    kept: dict[str, Json] = {key: value for key, value in section.items() if value not in (None, "auto")}
    said = {f"{SECTION}.{key}": kept.pop(key, None) for key in _SIZES}
    for key in _NESTED:
        nested = kept.get(key)
        if isinstance(nested, Mapping):
            said[f"{SECTION}.{key}.tp_size"] = nested.get("tp_size")
            kept[key] = {inner: value for inner, value in nested.items() if inner != "tp_size"}
    asking = {path: value for path, value in said.items() if value not in (None, "auto") and not _is_off(value)}
    if len({repr(value) for value in asking.values()}) > 1:
        both = " and ".join(f"{path} = {value!r}" for path, value in asking.items())
        raise ValueError(f"{both} each say how many ranks a layer is split over; keep one")
    blocks = [f"{SECTION}.blocks"] if kept.get("blocks", 1) != 1 else []
    _check_switch(section, [*asking, *blocks])
    kept.pop(_SWITCH, None)
    if asking:
        kept[_SIZE] = next(iter(asking.values()))
    return {**raw, SECTION: kept}


def _check_switch(section: Mapping[str, Json], asking: Sequence[str]) -> None:
    """Refuse a section that asks for a split model and does not say over how many ranks, or that says both."""
    switch = section.get(_SWITCH)
    if switch not in (None, "auto", True, False):
        raise ValueError(f"{SECTION}.{_SWITCH} must be true or false; got {switch!r}")
    if switch is False:
        if asking:
            raise ValueError(f"{SECTION}.{_SWITCH} is false, and {asking[0]} asks for layers to be split; keep one")
        return
    nested = [section[key] for key in _NESTED if key in section]
    if section.keys() & {*_SIZES, "blocks"} or any(isinstance(each, Mapping) and "tp_size" in each for each in nested):
        return
    wants = [key for key, value in section.items() if key not in _QUIET and value not in (None, "auto", False, {}, [])]
    if wants:
        near = next((hint for hint in (did_you_mean(key, _SIZES) for key in wants) if hint), "")
        raise ValueError(f"{SECTION}.{wants[0]} = {section[wants[0]]!r} and no number of ranks{near}: {_SAY}")


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
