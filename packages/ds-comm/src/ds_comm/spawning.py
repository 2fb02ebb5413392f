"""Starts ranks on this host, for commands."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable


def on_this_host(ranks: int, body: Callable[[int, str, argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Call ``body(rank, path of a store, options)`` in new processes, and wait for them.

    Raises:
        SystemExit: One failed; it names which.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ds-comm-") as folder:
        processes = [context.Process(target=body, args=(rank, f"{folder}/store", options)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        raise SystemExit(f"ranks {failed} failed: their output says why")


def check_at_least(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """End the command with its usage if an option is smaller than its ``least``.

    Raises:
        SystemExit: One is; the text names it.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            parser.error(f"--{name} must be at least {smallest}; got {value}")
