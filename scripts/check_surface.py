"""The surface users rely on, held against its snapshot: public names, config fields, entry points, command line.

Run as ``python scripts/check_surface.py``; with ``--update`` it writes ``docs/surface.txt`` anew, whose diff then shows
what a change means to users. Needs the wheels installed.
"""

from __future__ import annotations

import difflib
import dis
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
SNAPSHOT = ROOT / "docs" / "surface.txt"
MAX_NAMES = 12  # of one package root


def main() -> int:
    """Compare or update; return the exit code."""
    lines = [*_surface()]
    if "--update" in sys.argv:
        SNAPSHOT.write_text("\n".join(lines) + "\n")
        print(f"{SNAPSHOT.relative_to(ROOT)}: {len(lines)} lines")
        return 0
    known = SNAPSHOT.read_text().splitlines() if SNAPSHOT.exists() else []
    diff = list(difflib.unified_diff(known, lines, "snapshot", "now", lineterm="", n=0))
    print("\n".join(diff) or f"{len(lines)} lines, as in the snapshot")
    return 1 if diff else 0


def _surface() -> Iterator[str]:
    for wheel in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(wheel.read_text())["project"]
        package = importlib.import_module(project["name"].replace("-", "_"))
        if len(package.__all__) > MAX_NAMES:
            raise SystemExit(f"{package.__name__} exports {len(package.__all__)} names, at most {MAX_NAMES}")
        for name in sorted(package.__all__):
            yield from _object(f"{package.__name__}.{name}", getattr(package, name))
        for group, points in sorted(project.get("entry-points", {}).items()):
            yield from (f"entry point {group}: {name}" for name in sorted(points))
    yield from _config()
    yield from _commands(importlib.import_module("ds_core.cli").main, "ds")


def _object(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{name}{_signature(value)}"
        return
    yield f"class {name}"
    if is_dataclass(value):
        yield from (f"    {field.name}: {field.type}" for field in fields(value))
    elif hasattr(value, "_fields"):
        yield from (f"    {field}" for field in value._fields)
    ours = [kind for kind in reversed(value.__mro__) if kind.__module__.startswith(name.partition(".")[0])]
    if not is_dataclass(value):
        yield from (f"    {attribute} (attribute)" for attribute in sorted(_attributes(ours)))
    for member_name, member in sorted({key: each for kind in ours for key, each in vars(kind).items()}.items()):
        if isinstance(member, property):
            yield f"    {member_name} (property)"
        elif inspect.isfunction(member) and (not member_name.startswith("_") or member_name == "__call__"):
            yield f"    {member_name}{_signature(member)}"


def _attributes(kinds: list[type]) -> set[str]:
    """Return the public attributes that the constructors of a class set on its instances."""
    constructors = [vars(kind)["__init__"] for kind in kinds if inspect.isfunction(vars(kind).get("__init__"))]
    stores = (each for function in constructors for each in dis.get_instructions(function))
    return {each.argval for each in stores if each.opname == "STORE_ATTR" and not each.argval.startswith("_")}


def _signature(function: Any) -> str:
    # defaults that are objects print an address
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))


def _config() -> Iterator[str]:
    from ds_core.config import schema

    whole = schema()
    yield from (f"config key {path}" for path in sorted(set(_paths(whole, "", whole.get("$defs", {})))))


def _paths(schema: Any, prefix: str, definitions: Any) -> Iterator[str]:
    """Yield the dotted path of every key; ``$ref`` and ``anyOf`` are followed."""
    if "$ref" in schema:
        yield from _paths(definitions[schema["$ref"].rpartition("/")[2]], prefix, definitions)
    for choice in schema.get("anyOf", []):
        yield from _paths(choice, prefix, definitions)
    for name, value in schema.get("properties", {}).items():
        yield f"{prefix}{name}"
        yield from _paths(value, f"{prefix}{name}.", definitions)


def _commands(command: click.Command, name: str) -> Iterator[str]:
    for param in command.params:
        yield f"command {name} {' '.join(param.opts)}"
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield f"command {name} {child}"
            yield from _commands(command.commands[child], f"{name} {child}")


if __name__ == "__main__":
    sys.exit(main())
