"""The command ``ds``: launch training, report what is installed, check a configuration."""

from __future__ import annotations

import click

from .config import config
from .of_wheels import WithWheels
from .report import report
from .run import run


@click.group(cls=WithWheels, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ds-core")
def main() -> None:
    """Large-model training in small parts."""


main.add_command(config)
main.add_command(report)
main.add_command(run)

__all__ = ["main"]
