"""The command ``ds pipe``, and the same without ds-core: ``python -m ds_pipe.commands``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from .costs import Costs
from .measure import measure_costs
from .model import PipelineModule
from .pictures import trace
from .plan import Plan, Plans, compare
from .planned import write_plan
from .report import page, stages, table

_MODEL = """MODEL is a JSON file of costs, lists with a number for each layer: forward, input_grad, weight_grad in
seconds, kept_bytes, message_bytes (of a layer's input); or module:attribute, a PipelineModule or a function that
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
    plan.add_argument("--stages", type=int, required=True, metavar="P", help="ranks of the pipeline")
    plan.add_argument("--micro-batches", type=int, required=True, metavar="M", help="in one step")
    plan.add_argument(
        "--sample", default="sample", metavar="NAME", help="function that returns a micro-batch and target"
    )
    plan.add_argument("--batch", type=int, metavar="B", help="size of a micro-batch, given to the function")
    plan.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each layer")
    plan.add_argument("--latency", type=float, default=0.0, metavar="S", help="of a message, in seconds")
    plan.add_argument(
        "--bandwidth", type=float, default=float("inf"), metavar="B/S", help="of a link, in bytes a second"
    )
    plan.add_argument("--memory", type=float, metavar="BYTES", help="for activations and messages, on each rank")
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


class _MistakeError(Exception):
    """Something in the arguments is wrong; the text says what."""


class _Described(NamedTuple):
    costs: Costs
    names: Sequence[str]  # of layers; may be none


def _plan(given: argparse.Namespace) -> None:
    described = _of_file(Path(given.model)) if given.model.endswith(".json") else _of_module(given)
    costs = replace(described.costs, latency=given.latency, bytes_per_second=given.bandwidth)
    try:
        found = compare(costs, num_ranks=given.stages, num_micro_batches=given.micro_batches, memory=given.memory)
    except ValueError as error:
        raise _MistakeError(str(error)) from error
    chosen = _chosen(found, given.schedule)
    sys.stdout.write(f"{table(found)}\n\n{chosen.name}:\n{stages(chosen, described.names)}\n")
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


def _write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {name}\n")


_TUPLES = ("forward", "input_grad", "weight_grad", "kept_bytes", "message_bytes")


def _lists(costs: Costs) -> dict[str, Any]:
    return {name: value for name, value in asdict(costs).items() if name in _TUPLES}


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
    found = vars(importlib.import_module(name))
    missing = [wanted for wanted in (attribute, given.sample) if wanted not in found]
    if missing:
        raise _MistakeError(f"{name} has no {' and no '.join(missing)}: MODEL is module:attribute, --sample a function")
    made = found[attribute]
    model = made if isinstance(made, PipelineModule) else made()
    if not isinstance(model, PipelineModule):
        raise _MistakeError(
            f"{given.model} has to be a PipelineModule, or a function that returns one; got {type(model)}"
        )
    sample, target = found[given.sample](*([] if given.batch is None else [given.batch]))
    return _Described(measure_costs(model, sample, target, repeats=given.repeats), model.layer_names)


if __name__ == "__main__":
    main()
