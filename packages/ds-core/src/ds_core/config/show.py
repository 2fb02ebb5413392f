"""What a configuration comes to: its values as JSON, and the lines for the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING

from .._log import logger
from .sections import OWNED, SELECTING, ZERO, Choice, Config

if TYPE_CHECKING:
    from ..protocols import Json


def effective(config: Config) -> dict[str, Json]:
    """Return a configuration as JSON, all defaults filled in; parsing it gives the same configuration.

    Args:
        config: The configuration.

    Returns:
        A dictionary in the form of a file.

    Example:
        >>> sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}
        >>> effective(Config(**sizes, gradient_accumulation_steps=2))["gradient_clipping"]
        1.0
    """
    names = [each.name for each in fields(Config) if each.name in OWNED - SELECTING]
    values = {name: _json(value) for name, value in zip(names, attrgetter(*names)(config))}
    if config.optimizer is not None:
        values["optimizer"] = {"type": config.optimizer.name, "params": _settings(config.optimizer)}
    if config.scheduler is not None:
        values["scheduler"] = {"type": type(config.scheduler).__name__, "params": _json(config.scheduler)}
    for role, choice in config.plugins.items():
        if (role, choice.name) == ("partitioner", "zero"):
            values[ZERO] = _settings(choice)
        else:
            values[role] = {"name": choice.name, **_settings(choice)}
    return values


def value_at(values: Mapping[str, Json], path: str) -> str:
    """Return what stands at a dotted path, as text for a message."""
    value: Json = values
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return "its default"
        value = value[key]
    return repr(value)


def announce(config: Config) -> None:
    """Log what the caller should know of a configuration: one line of keys without effect, one of choices.

    Called once for each run, on one rank.

    Args:
        config: The configuration.
    """
    if config.no_effect:
        logger.info(
            "configuration keys without effect here: %s ('ds config check' gives the reasons)",
            ", ".join(sorted(config.no_effect)),
        )
    if config.chosen:
        logger.info(
            "chosen where the configuration left it open: %s",
            ", ".join(f"{key} = {value}" for key, value in sorted(config.chosen.items())),
        )


def _settings(choice: Choice) -> Mapping[str, Json]:
    if choice.config is None:
        return dict(choice.params)
    dumped = _json(choice.config)
    return dumped if isinstance(dumped, Mapping) else {}


def _json(value: object) -> Json:
    from pydantic import TypeAdapter

    dumped: Json = TypeAdapter(type(value)).dump_python(value, mode="json")
    return dumped
