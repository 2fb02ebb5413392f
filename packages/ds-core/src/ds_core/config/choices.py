"""Sections that select a plugin: which one, and its settings as it wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .. import schedules
from ..optimizers import canonical_name, torch_optimizer
from ..registry import MissingPluginError, did_you_mean
from .check import unknown_key, validated
from .sections import DEFAULT_NAMES, ROLE_GROUPS, ZERO, Choice
from .strip import known_keys

if TYPE_CHECKING:
    from ..protocols import Json, Plugin

LoadPlugin: TypeAlias = "Callable[[str, str], Plugin]"
"""Imports a plugin by group and name: :func:`ds_core.registry.load`."""


_IDLE: Mapping[str, Json] = {"stages": 1, "activation_checkpoint_interval": 0}  # as DeepSpeed's files have them


class TypeAndParams(NamedTuple):
    """DeepSpeed's form of an optimizer or a schedule."""

    type: str  # its name
    params: Mapping[str, Json]  # its settings


def plugins(raw: Mapping[str, Json], load_plugin: LoadPlugin) -> dict[str, Choice]:
    """Return the plugins that the sections named after roles select, and DeepSpeed's for the partitioner.

    Raises:
        ValueError: If two sections select the partitioner, a plugin cannot be loaded, or it refuses a setting.
    """
    if ZERO in raw and "partitioner" in raw:
        raise ValueError(
            f"both {ZERO} = {raw[ZERO]!r} and partitioner = {raw['partitioner']!r} select the partitioner; keep one"
        )
    found = {}
    if ZERO in raw:
        params = _object(raw[ZERO], ZERO)
        found["partitioner"] = _choice("partitioner", "zero", params, ZERO, load_plugin)
    for role in ROLE_GROUPS:
        if role in raw:
            params = _object(raw[role], role)
            if role in DEFAULT_NAMES and all(value in (None, "auto", _IDLE.get(key)) for key, value in params.items()):
                continue  # DeepSpeed's way of saying that there is no pipeline
            name = params.get("name", DEFAULT_NAMES.get(role))
            if not isinstance(name, str):
                raise ValueError(f"{role} must name its plugin: {{'name': ..., <settings>}}; got {raw[role]!r}")
            taken = {"name", *(key for key in _IDLE if role in DEFAULT_NAMES and params.get(key) in (None, "auto"))}
            rest = {key: value for key, value in params.items() if key not in taken}
            found[role] = _choice(role, name, rest, role, load_plugin)
    return found


def optimizer(value: Json, load_plugin: LoadPlugin) -> Choice:
    """Return the optimizer: an installed plugin of that name, or else a class of ``torch.optim``.

    ``params.torch_adam`` asks for torch's class whatever is installed.

    Raises:
        ValueError: If there is neither, or it refuses a setting.
    """
    name, params = _type_and_params(value, "optimizer")
    name = canonical_name(name)
    installed: tuple[str, ...] = ()
    note = ""
    if not params.get("torch_adam"):
        settings = {key: each for key, each in params.items() if key != "torch_adam"}
        try:
            fused = load_plugin("ds.optimizer", name)
        except MissingPluginError as missing:
            installed = missing.installed
            note = "torch.optim, because no installed plugin of the group 'ds.optimizer' has that name"
        else:
            config = _configured(fused, settings, "optimizer.params", name)
            return Choice(name=name, params=settings, plugin=fused, config=config)
    plugin = torch_optimizer(name, params, installed)
    return Choice(name=name, params=params, plugin=plugin, config=None, note=note)


def schedule(value: Json) -> schedules.Schedule:
    """Return the learning rate schedule.

    Raises:
        ValueError: If there is none of that name, or it refuses a setting.
    """
    name, params = _type_and_params(value, "scheduler")
    kinds = {kind.__name__: kind for kind in schedules.SCHEDULES}
    if name not in kinds:
        raise ValueError(
            f"scheduler.type = {name!r} is none of {', '.join(kinds)}; pass any other schedule, such as one of "
            f"torch.optim.lr_scheduler, as an object{did_you_mean(name, kinds)}"
        )
    kind: type[schedules.Schedule] = kinds[name]
    return validated(kind, params, "scheduler.params")


def _choice(role: str, name: str, params: Mapping[str, Json], path: str, load_plugin: LoadPlugin) -> Choice:
    plugin = load_plugin(ROLE_GROUPS[role], name)
    return Choice(name=name, params=params, plugin=plugin, config=_configured(plugin, params, path, name))


def _configured(plugin: Plugin, params: Mapping[str, Json], path: str, name: str) -> object:
    if plugin.config_type is not None:
        return validated(plugin.config_type, params, path, known_keys(path))
    if params:
        raise ValueError(f"the plugin {name!r} has no settings, but {path} = {dict(params)} gives some; remove them")
    return None


def _type_and_params(value: Json, path: str) -> TypeAndParams:
    section = _object(value, path)
    for key in section:
        if key not in TypeAndParams._fields:
            raise ValueError(unknown_key(f"{path}.{key}", section[key], TypeAndParams._fields))
    name = section.get("type")
    if not isinstance(name, str):
        raise ValueError(f"{path}.type must be a name; got {name!r} in {path} = {dict(section)}")
    params = section.get("params")
    return TypeAndParams(name, {} if params is None else _object(params, f"{path}.params"))


def _object(value: Json, path: str) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must be an object {{...}}; got {value!r}")
    return value
