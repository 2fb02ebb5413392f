"""Builds, tests and measures the wheels: ``nox -l`` lists the sessions, ``nox -s NAME`` runs one.

Each session makes its own virtual environment with virtualenv and pip, so that pip's own configuration decides where
torch comes from; ``constraints.txt`` pins what is tested. torch and NumPy lie on the disk once, in an environment that
the others look into.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
TORCH = ROOT / ".nox" / "torch"
_MADE = re.compile(r"/(build|__pycache__|\.[^/]*|[^/]*\.egg-info)/|\.so$")  # what is no source
WHEELS = ("ds-core", "ds-comm", "ds-kernels", "ds-pipe", "ds-zero")
GUARDS = ("lint", "types", "shape", "cycles", "surface")

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = True


# What a newcomer runs #


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a small language model on two processes, resume it on one, and measure memory at every ZeRO stage."""
    _install_wheels(session, *WHEELS, extra=["matplotlib"])
    session.env["OMP_NUM_THREADS"] = None  # ds run divides the cores among the processes
    out = ROOT / "out"
    shutil.rmtree(out, ignore_errors=True)
    train = ["examples/train_lm.py", "--out", str(out)]
    session.run("ds", "report")
    session.log("two processes, ZeRO stage 3, bfloat16: the first half")
    session.run("ds", "run", "--nproc", "2", *train, "--stop-at", "half")
    session.log("one process goes on from the checkpoint of two: the second half")
    session.run("ds", "run", "--nproc", "1", *train, "--resume", "--max-loss", "2.3")
    session.log("what each rank holds at ZeRO stages 0 to 3, and the formula")
    session.run("ds", "run", "--nproc", "2", "examples/memory.py")


@nox.session
def tests(session: nox.Session) -> None:
    """Run examples and tests of the wheels together, the tests of each alone and vendored, and the guards."""
    _install_wheels(session, *WHEELS, extra=["./tests-integration/testkit"])
    # the Triton kernels cannot be imported where torch comes without Triton
    no_triton = [f"--ignore-glob=*/backends/triton/{family}.py" for family in ("activations", "norms")]
    session.run("pytest", "--doctest-modules", *no_triton, "--pyargs", *(_package(wheel) for wheel in WHEELS))
    session.run("pytest", "tests-integration", *session.posargs)
    for name in (*(f"alone({wheel})" for wheel in WHEELS), *(f"vendor({wheel})" for wheel in WHEELS), *GUARDS):
        session.notify(name)


# Wheels by themselves #


@nox.session
@nox.parametrize("wheel", WHEELS, ids=WHEELS)
def alone(session: nox.Session, wheel: str) -> None:
    """Install one wheel beside torch, nothing else of ours, and run its tests."""
    _install_wheels(session, wheel, extra=["./tests-integration/testkit"])
    session.run("pytest", f"packages/{wheel}/tests", *session.posargs)


@nox.session
@nox.parametrize("wheel", WHEELS, ids=WHEELS)
def vendor(session: nox.Session, wheel: str) -> None:
    """Copy one wheel's folder into another package, under another name, and run its tests there."""
    package = _package(wheel)
    _install_wheels(session, wheel, extra=["./tests-integration/testkit"])
    tree = Path(session.create_tmp()).resolve() / wheel
    shutil.rmtree(tree, ignore_errors=True)
    home = tree / "host_app" / "_vendor"
    home.mkdir(parents=True)
    for folder in (home.parent, home):
        (folder / "__init__.py").write_text("")
    installed = session.run(
        "python", "-c", f"import {package}, pathlib; print(pathlib.Path({package}.__file__).parent)", silent=True
    )
    shutil.copytree(installed.strip(), home / package)
    shutil.copytree(ROOT / "packages" / wheel / "tests", tree / "tests")
    # the testkit, too, speaks of the wheel by its name; this copy comes before the installed one
    shutil.copytree(ROOT / "tests-integration" / "testkit" / "src" / "ds_testkit", tree / "ds_testkit")
    for path in (*(tree / "tests").rglob("*.py"), *(tree / "ds_testkit").rglob("*.py")):
        path.write_text(re.sub(rf"\b{package}\b", f"host_app._vendor.{package}", path.read_text()))
    shutil.copy(ROOT / "pyproject.toml", tree)  # settings of pytest
    session.run("pip", "uninstall", "--yes", "--quiet", wheel)
    session.chdir(tree)
    session.run("pytest", "tests", *session.posargs, env={"PYTHONPATH": str(tree)})


@nox.session
def build(session: nox.Session) -> None:
    """Build every wheel and source distribution into dist/, and check that a wheel installs from each."""
    session.install("-c", "constraints.txt", "build")
    for wheel in WHEELS:
        session.run("python", "-m", "build", "--outdir", "dist", f"packages/{wheel}", silent=True)
    for path in sorted((ROOT / "dist").glob("*")):
        session.log(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
    session.install("-c", "constraints.txt", *(str(path) for path in sorted((ROOT / "dist").glob("*.whl"))))
    session.run("ds", "report")


# Guards #


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy --strict."""
    _install_wheels(session, *WHEELS, extra=["mypy"])
    session.run("mypy", *(part for wheel in WHEELS for part in ("-p", _package(wheel))))


@nox.session
def shape(session: nox.Session) -> None:
    """Check sizes of files and functions, docstrings, forbidden constructs and the skeleton of each wheel."""
    session.run("python", "scripts/check_shape.py")


@nox.session
def cycles(session: nox.Session) -> None:
    """Check that imports form no cycle, fan out little and never cross from wheel to wheel."""
    session.run("python", "scripts/check_cycles.py")


@nox.session
def surface(session: nox.Session) -> None:
    """Hold public names, config keys, entry points and commands against docs/surface.txt (-- --update renews it)."""
    _install_wheels(session, *WHEELS)
    session.run("python", "scripts/check_surface.py", *session.posargs)


# Measurements #


@nox.session
def bench(session: nox.Session) -> None:
    """Measure: -- train, -- large, -- adamw and so on, and their options (see benchmarks/README.md)."""
    name, *options = session.posargs or ["train"]
    tools = ["pybind11", "setuptools", "ninja", "matplotlib"]
    _install_wheels(session, *WHEELS, extra=["./tests-integration/testkit", *tools])
    session.install("-c", "constraints.txt", "--no-build-isolation", "deepspeed==0.19.8", env={"DS_BUILD_OPS": "0"})
    programs = {
        "train": ["-m", "benchmarks.train"],
        "adamw": ["packages/ds-kernels/benchmarks/adamw.py"],
        "imports": ["packages/ds-kernels/benchmarks/imports.py"],
        "codecs": ["packages/ds-kernels/benchmarks/block_codecs.py"],
        "loss": ["packages/ds-kernels/benchmarks/linear_cross_entropy.py"],
        "optimizers": ["packages/ds-kernels/benchmarks/optimizers.py"],
        "pipeline": ["-m", "benchmarks.pipeline"],
        "overhead": ["packages/ds-pipe/benchmarks/overhead.py"],
        "pointwise": ["packages/ds-kernels/benchmarks/pointwise.py"],
        "state": ["-m", "benchmarks.optimizer_state"],
        "convergence": ["-m", "benchmarks.convergence"],
        "large": ["-m", "benchmarks.large"],
        "codes": ["packages/ds-comm/benchmarks/codecs.py"],
        "slow-link": ["benchmarks/slow_link.py"],
    }
    if name not in programs:
        session.error(f"no benchmark {name!r}; there are: {', '.join(programs)}")
    session.run("python", *programs[name], *options)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the GPU checks; where there is no GPU they are listed as not run."""
    _install_wheels(session, *WHEELS, extra=["./tests-integration/testkit"])
    session.run("python", "tests-integration/gpu/run.py", *session.posargs)


# Helpers #


def _package(wheel: str) -> str:
    return wheel.replace("-", "_")


def _install_wheels(session: nox.Session, *wheels: str, extra: list[str] | None = None) -> None:
    """Build and install wheels of ours, not editable: what is tested is what users get."""
    extras = [item for item in extra or [] if not item.startswith("./")]
    ours = [item for item in extra or [] if item.startswith("./")]
    _share_torch(session)
    if extras:
        session.install("-c", "constraints.txt", *extras)
    built = [_build_once(session, path) for path in [*(f"packages/{wheel}" for wheel in wheels), *ours]]
    session.install("-c", "constraints.txt", *built)


def _build_once(session: nox.Session, folder: str) -> str:
    """Return the wheel of a folder, built anew only if something in the folder has changed: kernels take a minute."""
    files = sorted(
        path for path in (ROOT / folder).rglob("*") if path.is_file() and not _MADE.search(str(path.relative_to(ROOT)))
    )
    content = b"".join(str(path).encode() + path.read_bytes() for path in files)
    home = ROOT / ".nox" / "wheels" / hashlib.sha256(content).hexdigest()[:16]
    if not any(home.glob("*.whl")):
        # a build folder left by an older build would put removed files into the wheel
        shutil.rmtree(ROOT / folder / "build", ignore_errors=True)
        session.run("python", "-m", "pip", "wheel", "--no-deps", "-w", str(home), f"./{folder}", silent=True)
    return str(next(home.glob("*.whl")))


def _share_torch(session: nox.Session) -> None:
    """Install torch once for all sessions; ten copies of it may not fit on a disk."""
    where = ("-c", "import site; print(site.getsitepackages()[0])")
    python = str(TORCH / "bin" / "python")
    if not TORCH.exists():
        session.run("python", "-m", "venv", str(TORCH), external=True)
    session.run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "torch", "numpy", external=True)
    shared, own = (str(session.run(who, *where, silent=True, external=True)).strip() for who in (python, "python"))
    Path(own, "torch_of_all_sessions.pth").write_text(f"{shared}\n")
