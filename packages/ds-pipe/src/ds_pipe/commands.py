"""The command ``ds pipe``, and the same without ds-core: ``python -m ds_pipe.commands``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .costs import Costs
from .measure import measure_costs
from .model import PipelineModule
from .pictures import trace
from .plan import Plan, Plans, compare
from .planned import write_plan
from .report import page, stages, table

_MODEL = """MODEL is a JSON file of costs, lists with a number for each layer: forward, input_grad, weight_grad in
seconds, kept_bytes, message_bytes (of a layer's input), and, where they are known, backward (seconds of a whole one)
and held_bytes (weights, gradients and optimizer state); or module:attribute, a PipelineModule or a function that
returns one. The module then has a function that returns one micro-batch and its target, too; with --batch it is given
that."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands.

    Args:
        arguments: The name of a command, and its arguments; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="ds pipe", description="Plans pipelines.")
    plan = parser.add_subparsers(dest="command", required=True).add_parser(
        "plan",
        help="compare schedules for a model",
        description="Measures a model's layers, and compares all schedules.",
        epilog=_MODEL,
    )
    plan.add_argument("model", metavar="MODEL", help="what the costs are of; see below")
    plan.add_argument("--stages", type=_number, required=True, metavar="P", help="ranks of the pipeline")
    plan.add_argument("--micro-batches", type=_number, required=True, metavar="M", help="in one step")
    plan.add_argument(
        "--sample", default="sample", metavar="NAME", help="function that returns a micro-batch and target"
    )
    plan.add_argument("--batch", type=_number, metavar="B", help="size of a micro-batch, given to the function")
    plan.add_argument("--repeats", type=_number, default=5, metavar="N", help="measurements of each layer")
    plan.add_argument("--latency", type=_seconds, default=0.0, metavar="S", help="of a message, in seconds")
    plan.add_argument(
        "--bandwidth", type=_positive, default=float("inf"), metavar="B/S", help="of a link, in bytes a second"
    )
    plan.add_argument(
        "--memory",
        type=_positive,
        metavar="BYTES",
        help="of each rank, for weights, activations and messages; otherwise no limit",
    )
    plan.add_argument(
        "--bytes-per-parameter",
        type=_positive,
        default=16.0,
        metavar="BYTES",
        help="of weight, gradient and optimizer state; 16: float32 and Adam",
    )
    plan.add_argument("--schedule", metavar="NAME", help="which one is written and drawn; otherwise the fastest")
    plan.add_argument(
        "--out",
        metavar="PREFIX",
        help="write PREFIX.plan.json (for training), .html, .trace.json (Perfetto), .costs.json",
    )
    given = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        _plan(given)
    except _MistakeError as error:
        plan.error(str(error))


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    found = _float(text)
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds, 0 or more, is needed; got {text!r}")
    return found


def _positive(text: str) -> float:
    found = _float(text)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed; got {text!r}")
    return found


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


class _MistakeError(Exception):
    """Something in the arguments is wrong; the text says what."""


class _Described(NamedTuple):
    costs: Costs
    names: Sequence[str]  # of layers; may be none


def _plan(given: argparse.Namespace) -> None:
    if given.out:
        _check_out(Path(given.out))
    described = _of_file(Path(given.model)) if given.model.endswith(".json") else _of_module(given)
    costs = replace(described.costs, latency=given.latency, bytes_per_second=given.bandwidth)
    try:
        found = compare(costs, num_ranks=given.stages, num_micro_batches=given.micro_batches, memory=given.memory)
    except ValueError as error:
        raise _MistakeError(str(error)) from error
    chosen = _chosen(found, given.schedule)
    sys.stdout.write(f"{table(found)}\n")
    if not chosen.fits:
        raise _MistakeError(_too_little(found, chosen, given.memory))
    sys.stdout.write(f"\n{chosen.name}:\n{stages(chosen, described.names)}\n")
    if given.out:
        title = f"{given.model}: {given.stages} ranks, {given.micro_batches} micro-batches"
        write_plan(Path(f"{given.out}.plan.json"), chosen.schedule, chosen.bounds)
        sys.stdout.write(f"wrote {given.out}.plan.json\n")
        _write(f"{given.out}.html", page(found, chosen, title=title))
        _write(f"{given.out}.trace.json", json.dumps(trace(chosen.timeline)))
        _write(f"{given.out}.costs.json", json.dumps({"layers": [*described.names], **_lists(costs)}, indent=1))


def _chosen(found: Plans, name: str | None) -> Plan:
    by_name = {plan.name: plan for plan in found.plans}
    if name is not None and name not in by_name:
        raise _MistakeError(f"there is no schedule {name!r} to draw; there are {', '.join(by_name)}")
    return found.plans[0] if name is None else by_name[name]


def _too_little(found: Plans, chosen: Plan, memory: float) -> str:
    given = f"--memory {memory:.0f}"
    if found.plans[0].fits:
        fitting = ", ".join(plan.name for plan in found.plans if plan.fits)
        return f"{chosen.name} does not fit into {given}: a rank takes {ceil(max(chosen.peak_bytes))}; {fitting} fit"
    least = min(found.plans, key=lambda plan: max(plan.peak_bytes))
    return (
        f"nothing fits into {given}; of these schedules {least.name} takes least: {ceil(max(least.peak_bytes))} bytes "
        "on its fullest rank"
    )


def _write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {name}\n")


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise _MistakeError(f"--out is what names of files begin with, and {out} is a folder: say {out / 'best'}")
    if not out.parent.is_dir():
        raise _MistakeError(f"--out {out}: there is no folder {out.parent}; make it first")


_TUPLES = ("forward", "input_grad", "weight_grad", "kept_bytes", "message_bytes")
_MORE = ("backward", "held_bytes")  # may be left out


def _lists(costs: Costs) -> dict[str, Any]:
    return {name: value for name, value in asdict(costs).items() if name in _TUPLES + _MORE}


def _of_file(path: Path) -> _Described:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        names = read.pop("layers", ())
        costs = Costs(**{name: tuple(map(float, values)) for name, values in read.items()})  # type: ignore[arg-type]  # checked below
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _MistakeError(
            f"{path} has to hold an object with lists of numbers, {', '.join(_TUPLES)}: {error}"
        ) from error
    return _Described(costs, names)


def _of_module(given: argparse.Namespace) -> _Described:
    name, colon, attribute = given.model.partition(":")
    if not colon:
        raise _MistakeError(f"MODEL is module:attribute or a file that ends in .json; got {given.model!r}")
    sys.path.insert(0, str(Path.cwd()))  # as python -m does
    try:
        found = vars(importlib.import_module(name))
    except ImportError as error:
        raise _MistakeError(
            f"the module {name!r} cannot be imported: {error}; it is looked for in this folder and where Python looks"
        ) from error
    missing = [wanted for wanted in (attribute, given.sample) if wanted not in found]
    if missing:
        raise _MistakeError(f"{name} has no {' and no '.join(missing)}: MODEL is module:attribute, --sample a function")
    made = found[attribute]
    model = _called(given.model, made) if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(model, PipelineModule):
        raise _MistakeError(
            f"{given.model} has to be a PipelineModule, or a function that returns one; got {type(model)}"
        )
    sample, target = _called(given.sample, found[given.sample], *([] if given.batch is None else [given.batch]))
    costs = measure_costs(model, sample, target, repeats=given.repeats, bytes_per_parameter=given.bytes_per_parameter)
    return _Described(costs, model.layer_names)


def _called(name: str, function: Callable[..., Any], *arguments: int) -> Any:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError) as error:
        given = f"the size given with --batch, {arguments[0]}" if arguments else "no argument"
        raise _MistakeError(f"{name} is called with {given}: {error}") from error
    return function(*arguments)


if __name__ == "__main__":
    main()
