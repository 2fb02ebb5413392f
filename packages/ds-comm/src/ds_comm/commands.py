"""The command ``ds comm``, and the same without ds-core: ``python -m ds_comm.commands``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import bench, probing

_COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {"bench": bench.main, "probe": probing.main}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands.

    Args:
        arguments: The name of a command, and its arguments; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="ds comm", description="Measures communication between ranks.")
    parser.add_argument(
        "command",
        choices=sorted(_COMMANDS),
        help="bench: time all collectives on this host; probe: latency and bandwidth between ranks",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; --help shows them")
    given = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    _COMMANDS[given.command](given.arguments, f"ds comm {given.command}")


if __name__ == "__main__":
    main()
