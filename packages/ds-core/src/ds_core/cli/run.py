"""``ds run``: start a script in several processes, and again when one of them failed."""

from __future__ import annotations

import os
import sys
import uuid
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import click

from .._env import OMP_NUM_THREADS, inherited_omp_num_threads, omp_num_threads

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig
    from typing_extensions import Unpack

_DEFAULT_PORT = 29500  # torchrun's


class Nodes(NamedTuple):
    """How many machines take part."""

    least: int  # training starts when so many are there
    most: int  # and goes on with up to so many


def read_nodes(context: click.Context, option: click.Parameter, value: str) -> Nodes:
    """Read ``N`` or ``LEAST:MOST``."""
    least, _, most = value.partition(":")
    low, high = (int(each) if each.isdecimal() else 0 for each in (least, most or least))
    if not 1 <= low <= high:
        raise click.BadParameter(
            f"{value!r} is neither a number of machines nor LEAST:MOST with 1 <= LEAST <= MOST",
            context,
            option,
        )
    return Nodes(low, high)


class Placement(TypedDict):
    """Where processes run: the options of the command."""

    nproc: int  # processes on this machine
    nnodes: Nodes  # machines
    node_rank: int  # index of this machine
    master_addr: str  # host name of machine 0
    master_port: int | None  # port of machine 0
    max_restarts: int  # after failed workers


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine.")
@click.option("--nnodes", metavar="N|LEAST:MOST", default="1", callback=read_nodes, help="Machines. [default: 1]")
@click.option("--node-rank", type=click.IntRange(0), default=0, show_default=True, help="Index of this machine.")
@click.option("--master-addr", default="127.0.0.1", show_default=True, help="Host name of machine 0.")
@click.option("--master-port", type=click.IntRange(1, 65535), help="Its port. [default: 29500; any, if alone]")
@click.option("--max-restarts", type=click.IntRange(0), default=0, show_default=True, help="After failures.")
@click.option("-m", "--module", "is_module", is_flag=True, help="SCRIPT is the name of a module.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...], *, is_module: bool, **placement: Unpack[Placement]) -> None:
    """Run SCRIPT with ARGS in several processes, as torchrun does.

    Exits with the exit code of the process that failed first.
    """
    if not is_module and not Path(script).is_file():
        raise click.ClickException(f"there is no file {script!r}; to run a module, write: ds run -m {script}")
    command = ["-u", "-m", script, *args] if is_module else ["-u", script, *args]
    threads = nullcontext() if omp_num_threads() else inherited_omp_num_threads(_share(placement["nproc"]))
    with threads:
        sys.exit(_launch(placement, command))


def launch_config(placement: Placement, folder: str) -> LaunchConfig:
    """Return what torch's elastic agent is started with.

    One machine meets itself at any free port. A fixed number of machines is ranked by ``node_rank``; with a
    range, machines may come and go, and are ranked as they come.

    Args:
        placement: The options of the command.
        folder: Where the agent keeps its notes on errors; without one it makes a folder and leaves it behind.

    Returns:
        The agent's configuration.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    nodes, port = placement["nnodes"], placement["master_port"]
    endpoint = f"{placement['master_addr']}:{port or _DEFAULT_PORT}"
    config = LaunchConfig(
        min_nodes=nodes.least,
        max_nodes=nodes.most,
        nproc_per_node=placement["nproc"],
        max_restarts=placement["max_restarts"],
        run_id="ds",
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"timeout": 900},
    )
    if nodes.most == 1:
        # A name of its own, so that two runs on one machine do not meet.
        config.run_id = uuid.uuid4().hex
        config.rdzv_endpoint = f"127.0.0.1:{port or 0}"
        config.local_addr = "127.0.0.1"
    elif nodes.least == nodes.most:
        config.rdzv_backend = "static"
        config.rdzv_configs["rank"] = placement["node_rank"]
    else:
        config.rdzv_configs["is_host"] = placement["node_rank"] == 0
    return config


def _share(nproc: int) -> int:
    """Return the threads of each process, and say so: without, each would start one for each core."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = max(1, cores // nproc)
    click.echo(f"{OMP_NUM_THREADS} is not set: using {threads} ({cores} cores, {nproc} processes)", err=True)
    return threads


def _launch(placement: Placement, command: list[str]) -> int:
    """Run to the end and return the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        with TemporaryDirectory(prefix="ds-run-") as folder:
            elastic_launch(launch_config(placement, folder), sys.executable)(*command)
    except ChildFailedError as error:
        return _explain(error)
    except SignalException as signal:
        click.echo(f"stopped by {signal.sigval.name}", err=True)
        return 128 + int(signal.sigval)
    return 0


def _explain(error: ChildFailedError) -> int:
    """Say which process failed first, and return its exit code."""
    rank, failure = error.get_first_failure()
    # A process that was killed has the negative number of the signal; a shell shows 128 plus it.
    code = 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with code {code}"
    click.echo(f"rank {rank} (process {failure.pid}) {how}; what it wrote stands above", err=True)
    return code
