"""The value ``"auto"``: resolved where this wheel can know, an error where only the caller can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .sections import OWNED

if TYPE_CHECKING:
    from ..protocols import Json

_LR = "optimizer.params.lr"
_MAX_LR = "scheduler.params.warmup_max_lr"

_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")
_NO_SIZE = f"the batch size (a number for {' or '.join(_SIZES)} will do, the others follow)"

CALLER_KNOWS: Mapping[str, str] = {
    **dict.fromkeys(_SIZES, _NO_SIZE),
    _LR: "the learning rate",
    "optimizer.type": "the optimizer",
    "scheduler.type": "the schedule",
    _MAX_LR: "the learning rate (and optimizer.params.lr is no number to take it from)",
    "scheduler.params.cycle_max_lr": "the learning rate",
    "scheduler.params.cycle_min_lr": "the learning rate",
    "scheduler.params.total_num_steps": "the length of training",
    "scheduler.params.warmup_num_steps": "the length of the warm-up",
    "zero_optimization.stage": "how much memory there is",
}
"""Keys for which no value can be chosen here, unless it follows from another, and what the caller alone knows."""

MEANINGFUL = frozenset({"kernels.backend"})
"""Keys for which ``"auto"`` is a value like others."""


class Resolved(NamedTuple):
    """A configuration without ``"auto"``."""

    kept: dict[str, Json]  # keys to be chosen by default are absent
    keys: tuple[str, ...]  # dotted paths that were "auto"


def resolve(raw: Mapping[str, Json]) -> Resolved:
    """Replace ``"auto"`` by a documented choice.

    Batch sizes follow from the batch rule, ``warmup_max_lr`` is the optimizer's learning rate, and every
    other key takes its default. In a section that names its plugin, ``"auto"`` is the plugin's to read.

    Args:
        raw: The configuration, without the keys that have no effect.

    Returns:
        The rest, and the keys that were chosen.

    Raises:
        ValueError: If only the caller can know; all such keys are named.

    Example:
        >>> resolve({"train_batch_size": 8, "seed": "auto"})
        Resolved(kept={'train_batch_size': 8}, keys=('seed',))
    """
    lr = _learning_rate(raw)
    keys: list[str] = []
    owned = {key: value for key, value in raw.items() if key in OWNED}
    kept = _resolve(owned, "", lr, keys)
    follow = set(_SIZES) if any(kept.get(key) is not None for key in _SIZES) else set()
    if lr is not None:
        follow.add(_MAX_LR)
    unknown = [key for key in keys if key in CALLER_KNOWS and key not in follow]
    if unknown:
        raise ValueError(
            "\n".join(f"{key} = 'auto', but only the caller knows {CALLER_KNOWS[key]}" for key in unknown)
            + "\nPut values there before the configuration is read, as Hugging Face's Trainer does."
        )
    others = {key: value for key, value in raw.items() if key not in OWNED}
    return Resolved({**others, **kept}, tuple(keys))


def _resolve(raw: Mapping[str, Json], section: str, lr: float | None, keys: list[str]) -> dict[str, Json]:
    kept: dict[str, Json] = {}
    for key, value in raw.items():
        path = f"{section}.{key}" if section else key
        if isinstance(value, Mapping):
            kept[key] = _resolve(value, path, lr, keys)
        elif value != "auto" or path in MEANINGFUL:
            kept[key] = value
        else:
            keys.append(path)
            if path == _MAX_LR and lr is not None:
                kept[key] = lr
    return kept


def _learning_rate(raw: Mapping[str, Json]) -> float | None:
    """Return the optimizer's learning rate, if it stands there."""
    value: Json = raw
    for key in _LR.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) else None
