"""From JSON values to the one frozen configuration."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import auto, batch, choices, rules
from .check import unknown_key, validated
from .compression import as_section
from .quantized import as_collectives
from .sections import BATCH_KEYS, OWNED, ROLE_GROUPS, SELECTING, ZERO, Config
from .show import effective, value_at
from .strip import known_keys, strip
from .tensor import as_one_size, without_idle

if TYPE_CHECKING:
    from ..protocols import Json
    from .choices import LoadPlugin


def parse(
    raw: Mapping[str, Json], world_size: int, load_plugin: LoadPlugin, *, client_optimizer: bool = False
) -> Config:
    """Make the configuration of a run.

    In order: old spellings; keys without effect are taken out; ``"auto"`` is resolved; rules between
    sections; plugins that are named are loaded, and read their own settings; the rest is checked key by key.

    Args:
        raw: What :func:`read` returned.
        world_size: Data-parallel ranks.
        load_plugin: Imports a plugin by group and name, such as :func:`ds_core.registry.load`.
        client_optimizer: Whether the caller passes an optimizer: it wins over the section ``optimizer``, and a
            schedule can work on it.

    Returns:
        The configuration.

    Raises:
        ValueError: If a key is unknown, a value has the wrong type or is out of bounds, sections contradict each
            other, a plugin cannot be used, or a feature is asked for that this version does not provide.

    Example:
        >>> from ds_core.registry import load
        >>> parse({"train_batch_size": 16, "bf16": {"enabled": True}}, 4, load).train_micro_batch_size_per_gpu
        4
    """
    kept, no_effect = strip(as_section(as_collectives(as_one_size(_modernized(raw)))))
    kept = without_idle(kept, no_effect)
    if client_optimizer and kept.pop("optimizer", None) is not None:
        no_effect["optimizer"] = "the caller passes an optimizer, which wins"
    resolved = auto.resolve(kept)
    given = {key: value for key, value in resolved.kept.items() if value is not None}
    unknown = [key for key in given if key not in OWNED and key not in ROLE_GROUPS]
    if unknown:
        known = {*OWNED, *ROLE_GROUPS, *known_keys()}
        raise ValueError("\n".join(unknown_key(key, given[key], known) for key in unknown))
    rules.check(given, client_optimizer=client_optimizer)
    config = Config(**_values(given, world_size, load_plugin))
    return _with_notes(config, resolved.keys, no_effect)


def _modernized(raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return a configuration with DeepSpeed's old spellings replaced."""
    given = dict(raw)
    if "bfloat16" in given:
        if "bf16" in given:
            raise ValueError(
                f"bfloat16 = {given['bfloat16']!r} is the old name of bf16 = {given['bf16']!r}; keep the latter"
            )
        given["bf16"] = given.pop("bfloat16")
    if isinstance(given.get(ZERO), bool):
        given[ZERO] = {"stage": 1 if given[ZERO] else 0}
    return given


def _values(given: Mapping[str, Json], world_size: int, load_plugin: LoadPlugin) -> dict[str, Any]:
    """Return the fields of the configuration."""
    hints = typing.get_type_hints(Config)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key in (OWNED - SELECTING) & given.keys():
        try:
            values[key] = validated(hints[key], _without_null(given[key]), key, known_keys(key))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(sorted(problems)))
    sizes = batch.resolve(*(values.get(key) for key in BATCH_KEYS), ranks=world_size)
    values.update(zip(BATCH_KEYS, sizes))
    values["plugins"] = choices.plugins(given, load_plugin)
    if "optimizer" in given:
        values["optimizer"] = choices.optimizer(given["optimizer"], load_plugin)
    if "scheduler" in given:
        values["scheduler"] = choices.schedule(given["scheduler"])
    return values


def _without_null(value: Json) -> Json:
    """Return a section without its keys that are null, which is DeepSpeed's way of writing a default."""
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, Mapping) else value


def _with_notes(config: Config, auto_keys: Iterable[str], no_effect: Mapping[str, str]) -> Config:
    """Add what had no effect and what was chosen."""
    values = effective(config)
    chosen = {key: value_at(values, key) for key in auto_keys}
    if config.optimizer is not None and config.optimizer.note:
        chosen["optimizer.type"] = config.optimizer.note
    return replace(config, no_effect={**no_effect, **rules.idle(config)}, chosen=chosen)
