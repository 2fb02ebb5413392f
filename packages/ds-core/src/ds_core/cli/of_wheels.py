"""Commands that other wheels bring: ``ds comm``, ``ds pipe``.

An entry point of the group ``ds.commands`` names a function that takes the arguments after its name as a list of
texts, and prints its own help for ``--help``. So a wheel needs nothing of ds-core, nor of click, to have a command, and
is imported only when its command is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_GROUP = "ds.commands"


class WithWheels(click.Group):
    """A group of commands, and those of the installed wheels."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *_entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one command; ours wins over a wheel's of the same name."""
        own = super().get_command(ctx, cmd_name)
        point = _entry_points().get(cmd_name)
        return own if own is not None or point is None else _command(point)


def _entry_points() -> dict[str, EntryPoint]:
    # imported here: it takes milliseconds, which ``ds run`` need not wait for
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=_GROUP)}


def _command(point: EntryPoint) -> click.Command:
    wheel = point.dist.name if point.dist else point.value

    @click.command(
        point.name,
        short_help=f"Commands of {wheel}.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        point.load()(list(arguments))

    return command
