"""Times importing ds_kernels over torch, and its first step, in fresh interpreters that take turns; builds both wheels.

    python benchmarks/imports.py --home /tmp/wheels --out imports.md

Two wheels are built from this folder, one with the compiler and one without (``CC=false``), installed into folders
below ``--home`` (once: a later run measures those it finds there), and measured there. ``import``: from after ``import
torch`` to the package being there. ``first step``: from there to the end of one AdamW step over 1,000 elements, which
loads the native module. ``second step``: the same again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from adamw import header

HERE = Path(__file__).parent.parent
CODE = """
import json, logging, sys, time
import torch
logging.disable()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # torch imports more with the first optimizer of any class
before, times = set(sys.modules), [time.perf_counter()]
import ds_kernels
times.append(time.perf_counter())
modules = len(set(sys.modules) - before)
weight = torch.nn.Parameter(torch.zeros(1000))
weight.grad = torch.ones(1000)
optimizer = ds_kernels.AdamW([weight])
for _ in range(2):
    optimizer.step()
    times.append(time.perf_counter())
print(json.dumps([modules, *(1e3 * (b - a) for a, b in zip(times, times[1:]))]))
"""


class Wheel(NamedTuple):
    """A wheel, and where it is installed."""

    name: str
    folder: Path
    kib: float
    native: bool


def installed_wheel(name: str, home: Path, env: dict[str, str]) -> Wheel:
    """Return the wheel, built and installed if it is not there."""
    wheels, folder = home / name / "wheel", home / name / "site"
    if not folder.exists():
        build(home / name / "src", wheels, folder, env)
    [wheel] = wheels.glob("*.whl")
    native = any((folder / "ds_kernels").glob("_native*.so"))
    return Wheel(name, folder, wheel.stat().st_size / 1024, native)


def build(sources: Path, wheels: Path, folder: Path, env: dict[str, str]) -> None:
    """Build a wheel from a copy of the sources, and install it."""
    skip = shutil.ignore_patterns("build", "*.so", "__pycache__", "*.egg-info", ".hypothesis")
    shutil.copytree(HERE, sources, ignore=skip)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(sources)]
    subprocess.run(command, check=True, env={**os.environ, **env})
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), *map(str, wheels.glob("*.whl"))], check=True)


def sample(wheel: Wheel) -> list[float]:
    """Return modules imported, and milliseconds: import, first and second step."""
    env = {**os.environ, "PYTHONPATH": str(wheel.folder)}
    done = subprocess.run([sys.executable, "-c", CODE], check=True, env=env, capture_output=True, text=True)
    return json.loads(done.stdout)


def report(wheels: list[Wheel], samples: dict[str, list[list[float]]], rounds: int) -> list[str]:
    _, _, machine, *_ = header(rounds)
    lines = [
        "# Importing ds_kernels",
        "",
        "`python packages/ds-kernels/benchmarks/imports.py --home DIR`",
        "",
        machine,
        f"{rounds} fresh interpreters for each wheel, taking turns; milliseconds, median (largest). `import` is what",
        "`import ds_kernels` adds to `import torch`; the first step loads the native module where there is one.",
        "",
        "| wheel | size | modules added | import | first step | second step |",
        "|---|---|---|---|---|---|",
    ]
    for wheel in wheels:
        modules, *times = zip(*samples[wheel.name], strict=True)
        cells = " | ".join(f"{statistics.median(column):.1f} ({max(column):.1f})" for column in times)
        kind = "native" if wheel.native else "plain torch"
        row = f"{wheel.name}: {kind} | {wheel.kib:.0f} KiB | {modules[0]}"
        lines.append(f"| {row} | {cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True, help="folder for the wheels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    wheels = [
        installed_wheel("with a compiler", args.home, {}),
        installed_wheel("without one", args.home, {"CC": "false", "CXX": "false"}),
    ]
    if [wheel.native for wheel in wheels] != [True, False]:
        raise SystemExit(f"one wheel with the native module and one without were to be built; got {wheels}")
    samples: dict[str, list[list[float]]] = {wheel.name: [] for wheel in wheels}
    for _ in range(args.rounds):
        for wheel in wheels:
            samples[wheel.name].append(sample(wheel))
    lines = report(wheels, samples, args.rounds)
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
