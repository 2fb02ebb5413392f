"""``ds report``: what is installed here and what of it can be used."""

from __future__ import annotations

import json
import platform
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import click

if TYPE_CHECKING:
    from ..protocols import Plugin
    from ..registry import Installed


class PluginRow(NamedTuple):
    """One plugin, as the report shows it."""

    group: str
    name: str
    wheel: str  # with its version
    target: str  # module:object
    problem: str | None  # why it cannot be used here


class Report(TypedDict):
    """The whole report."""

    python: str
    torch: str
    cpu: str
    devices: list[str]
    wheels: dict[str, str | None]
    plugins: list[PluginRow]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def report(*, as_json: bool) -> None:
    """Show versions, devices, wheels and plugins, and why a plugin cannot be used."""
    found = collect()
    if as_json:
        rows = [row._asdict() for row in found["plugins"]]
        click.echo(json.dumps({**found, "plugins": rows}, indent=2))
    else:
        _print(found)


def collect() -> Report:
    """Look at this machine.

    Returns:
        What is here. Plugins are imported to see whether they can be.
    """
    import torch

    from ..protocols import GROUPS
    from ..registry import installed

    found = [(group, row) for group in GROUPS for row in installed(group)]
    return {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "wheels": _wheels({row.distribution for _, row in found}),
        "plugins": [_examine(group, row) for group, row in found],
    }


def _wheels(offering: set[str]) -> dict[str, str | None]:
    """Return the version of each wheel of ours, None where it is not installed, and of others that offer
    plugins.
    """
    from importlib.metadata import PackageNotFoundError, version

    from ..protocols import GROUPS

    versions: dict[str, str | None] = {}
    for name in sorted({"ds-core", *chain(*GROUPS.values()), *offering}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _examine(group: str, row: Installed) -> PluginRow:
    from ..registry import PluginError, load

    try:
        plugin = load(group, row.name)
        problem = _unusable(plugin) if group == "ds.kernels" else None
    except PluginError as error:
        problem = str(error)
    return PluginRow(group, row.name, f"{row.distribution} {row.version}", row.target, problem)


def _unusable(plugin: Plugin) -> str | None:
    """Return why a kernel backend cannot run on this machine's CPU; it is the one role that can say so."""
    import torch

    from ..kernel_protocols import KernelBackend
    from ..protocols import BuildContext

    try:
        settings = plugin.config_type() if plugin.config_type else None
        backend: KernelBackend = plugin.build(settings, BuildContext(device=torch.device("cpu")))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return backend.unusable()


def _print(found: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = Table("", "here", title="Machine", title_justify="left", show_header=False)
    machine.add_row("Python", found["python"])
    machine.add_row("torch", found["torch"])
    machine.add_row("CPU", found["cpu"])
    machine.add_row("devices", "\n".join(found["devices"]) or "none besides the CPU")
    wheels = Table("wheel", "version", title="Wheels", title_justify="left")
    for name, version in found["wheels"].items():
        wheels.add_row(name, version or "not installed")
    plugins = Table("group", "name", "wheel", "usable", title="Plugins", title_justify="left")
    for row in found["plugins"]:
        plugins.add_row(row.group, row.name, row.wheel, f"no: {row.problem}" if row.problem else "yes")
    for table in (machine, wheels, plugins):
        console.print(table)
