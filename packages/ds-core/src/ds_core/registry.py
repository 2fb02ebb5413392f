"""Plugins: found by group and name among the installed distributions, imported only when named.

See [Note: Plugins] in ``protocols.py``. Nothing is scanned at import and nothing is kept: an entry point is
data of an installed wheel, and reading it takes milliseconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, cast

from .protocols import GROUPS, ROLE_VERSIONS, Plugin

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class PluginError(ValueError):
    """A plugin was named that cannot be used."""


class MissingPluginError(PluginError):
    """A plugin was named that is not installed.

    Attributes:
        installed: Names that are, in the same group.
    """

    def __init__(self, group: str, name: str, installed: tuple[str, ...]) -> None:
        wheels = " ".join(GROUPS[group])
        cure = f"plugins of this group come with 'pip install {wheels}'" if wheels else "no wheel of ours offers any"
        super().__init__(
            f"no installed wheel offers a plugin {name!r} in the group {group!r}; "
            f"installed there: {', '.join(installed) or 'none'}; {cure}{did_you_mean(name, installed)}"
        )
        self.installed = installed


class Installed(NamedTuple):
    """A plugin that some installed wheel offers."""

    name: str  # what a configuration calls it
    distribution: str  # the wheel
    version: str  # of the wheel
    target: str  # module:object


def installed(group: str) -> list[Installed]:
    """List the plugins of a group, by name, without importing any.

    Args:
        group: One of :data:`ds_core.protocols.GROUPS`.

    Returns:
        One row for each offer; a name that two wheels offer stands twice.

    Raises:
        ValueError: If the group is none of ours.

    Example:
        >>> installed("ds.storage")
        Traceback (most recent call last):
            ...
        ValueError: unknown plugin group 'ds.storage'; did you mean 'ds.store'?
    """
    return sorted(_row(point) for point in _entry_points(group))


def load(group: str, name: str) -> Plugin:
    """Import a plugin.

    Args:
        group: One of :data:`ds_core.protocols.GROUPS`.
        name: The name of its entry point.

    Returns:
        The plugin object.

    Raises:
        MissingPluginError: If no installed wheel offers it.
        PluginError: If two do, if its import fails, or if it was written for another version of its role.
        ValueError: If the group is none of ours.
    """
    points = [point for point in _entry_points(group) if point.name == name]
    if not points:
        raise MissingPluginError(group, name, tuple(sorted({row.name for row in installed(group)})))
    rows = [_row(point) for point in points]
    if len(rows) > 1:
        offers = " and ".join(f"{row.distribution} {row.version} ({row.target})" for row in rows)
        raise PluginError(
            f"{len(rows)} wheels offer a plugin {name!r} in the group {group!r}: {offers}; uninstall all but one"
        )
    return _import(group, points[0], rows[0])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message that names the nearest known name, or nothing."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like ``name``, if one is."""
    folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[near[0]] if near else None


def _entry_points(group: str) -> list[EntryPoint]:
    # Imported here: most runs name one or two plugins, and some none.
    from importlib.metadata import entry_points

    if group not in GROUPS:
        raise ValueError(f"unknown plugin group {group!r}{did_you_mean(group, GROUPS)}")
    return list(entry_points(group=group))


def _row(point: EntryPoint) -> Installed:
    wheel = point.dist
    if wheel is None:
        return Installed(point.name, "a distribution without metadata", "unknown", point.value)
    return Installed(point.name, wheel.name, wheel.version, point.value)


def _import(group: str, point: EntryPoint, row: Installed) -> Plugin:
    origin = f"the plugin {row.name!r} ({group}) of {row.distribution} {row.version}"
    try:
        plugin = cast("Plugin", point.load())
        version = plugin.role_version
    except Exception as error:
        raise PluginError(
            f"{origin} failed to import from {row.target!r}: {type(error).__name__}: {error}; "
            "repair or uninstall that wheel"
        ) from error
    if version != ROLE_VERSIONS[group]:
        raise PluginError(
            f"{origin} speaks version {version} of its role, this ds-core speaks version "
            f"{ROLE_VERSIONS[group]}; install releases of {row.distribution} and ds-core that belong together"
        )
    return plugin
