"""``ds config``: what a configuration file comes to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..config import Config


@click.group()
def config() -> None:
    """Check a configuration file, or print the schema of one."""


@config.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--world-size", type=click.IntRange(min=1), default=1, show_default=True, help="Data-parallel ranks.")
def check(file: str, world_size: int) -> None:
    """Print the effective configuration of FILE, and which of its keys have no effect.

    Plugins that FILE names are loaded, so that they check their settings. Exits with 1 when FILE has errors.
    """
    # Imported here, so that 'ds --help' needs neither torch nor pydantic.
    from ..config import effective, parse, read
    from ..registry import load

    try:
        raw = read(file)
        # A file without an optimizer is meant for a script that passes one.
        parsed = parse(raw, world_size, load, client_optimizer="optimizer" not in raw)
    except ValueError as error:
        raise click.ClickException(f"{file}, with --world-size {world_size}:\n{error}") from error
    click.echo(json.dumps(effective(parsed), indent=2))
    _print_notes(parsed)


@config.command()
def schema() -> None:
    """Print the JSON Schema of the effective configuration."""
    from ..config import schema as schema_of_config

    click.echo(json.dumps(schema_of_config(), indent=2))


def _print_notes(parsed: Config) -> None:
    """Write to stderr, so that stdout is JSON."""
    if parsed.chosen:
        click.echo("\nChosen where the file left it open:", err=True)
        for key, value in sorted(parsed.chosen.items()):
            click.echo(f"  {key} = {value}", err=True)
    if parsed.no_effect:
        click.echo("\nKeys without effect here:", err=True)
        for key, reason in sorted(parsed.no_effect.items()):
            click.echo(f"  {key}: {reason}", err=True)
