"""Taking out of a configuration what has no effect here, and refusing what this version cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .check import unknown_key
from .no_effect import NO_EFFECT
from .sections import OWNED, ROLE_GROUPS
from .unavailable import UNAVAILABLE, Feature

if TYPE_CHECKING:
    from ..protocols import Json


class Stripped(NamedTuple):
    """A configuration without the keys of the two tables."""

    kept: dict[str, Json]  # what is left
    no_effect: dict[str, str]  # keys taken out that the file sets, with the reason


def strip(raw: Mapping[str, Json]) -> Stripped:
    """Take the keys of ``no_effect.py`` and ``unavailable.py`` out of a configuration.

    Args:
        raw: The configuration, as the file has it.

    Returns:
        The rest, and the keys that have no effect.

    Raises:
        ValueError: If a key asks for a feature that this version does not provide; all such keys are named.
            Likewise for unknown keys in the sections that only the tables know.

    Example:
        >>> strip({"train_batch_size": 8, "zero_optimization": {"stage": 2, "overlap_comm": True}}).kept
        {'train_batch_size': 8, 'zero_optimization': {'stage': 2}}
    """
    work = _Strip()
    kept = work.section(raw, "")
    if work.problems:
        raise ValueError("\n".join(work.problems))
    return Stripped(kept, work.no_effect)


def with_effect(raw: Mapping[str, Json], section: str = "") -> dict[str, Json]:
    """Return the values that a configuration has, by dotted path, without keys that have no effect.

    Example:
        >>> with_effect({"steps_per_print": 1, "zero_optimization": {"stage": 2, "overlap_comm": True}})
        {'zero_optimization.stage': 2}
    """
    found: dict[str, Json] = {}
    for key, value in raw.items():
        path = f"{section}.{key}" if section else key
        is_off = path in UNAVAILABLE and _is_off(value, UNAVAILABLE[path])
        if isinstance(value, Mapping):
            found |= with_effect(value, path)
        elif not is_off and path not in NO_EFFECT and _wildcard_reason(path) is None:
            found[path] = value
    return found


def known_keys(section: str = "") -> set[str]:
    """Return the keys right below a dotted path that the two tables know; ``*`` where any is allowed."""
    prefix = f"{section}." if section else ""
    below = (path[len(prefix) :] for path in (*NO_EFFECT, *UNAVAILABLE) if path.startswith(prefix))
    return {rest.split(".")[0] for rest in below}


class _Strip:
    """One pass over a configuration; collects what it takes out and what it refuses."""

    def __init__(self) -> None:
        self.no_effect: dict[str, str] = {}
        self.problems: list[str] = []

    def section(self, raw: Mapping[str, Json], section: str) -> dict[str, Json]:
        """Return what is left of a section."""
        kept: dict[str, Json] = {}
        for key, value in raw.items():
            path = f"{section}.{key}" if section else key
            if path in UNAVAILABLE:
                self._refuse(path, value)
            elif known_keys(path):
                self._inner(kept, key, path, value)
            elif reason := NO_EFFECT.get(path) or _wildcard_reason(path):
                self.no_effect[path] = reason
            elif not section or section in OWNED or section in ROLE_GROUPS:
                kept[key] = value
            else:
                self.problems.append(unknown_key(path, value, known_keys(section)))
        return kept

    def _refuse(self, path: str, value: Json) -> None:
        feature = UNAVAILABLE[path]
        if not _is_off(value, feature):
            self.problems.append(_refusal(path, value, feature))

    def _inner(self, kept: dict[str, Json], key: str, path: str, value: Json) -> None:
        if isinstance(value, Mapping):
            inner = self.section(value, path)
            if path in OWNED or path in ROLE_GROUPS:
                kept[key] = inner
        elif path in OWNED:
            kept[key] = value
        elif value not in (None, "auto"):
            self.problems.append(f"{path} must be an object {{...}}; got {value!r}")


def _wildcard_reason(path: str) -> str | None:
    parts = path.split(".")
    ancestors = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((NO_EFFECT[f"{each}.*"] for each in ancestors if f"{each}.*" in NO_EFFECT), None)


def _is_off(value: Json, feature: Feature) -> bool:
    if value is None or value == "auto":
        return True
    # 1 == True in Python, but a switch is no number; and DeepSpeed compares names in any case.
    folded = value.casefold() if isinstance(value, str) else value
    return any(folded == off and isinstance(value, bool) == isinstance(off, bool) for off in feature.off)


def _refusal(path: str, value: Json, feature: Feature) -> str:
    whose = f" (it is the job of the wheel {feature.wheel})" if feature.wheel else ""
    off = " or ".join(json.dumps(each) for each in (*feature.off, None))
    return (
        f"{path} = {value!r} asks for {feature.name}, which this version does not provide{whose}; "
        f"remove the key, or set it to {off}"
    )
