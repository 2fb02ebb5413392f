"""Importing costs little and does nothing; without the native module everything still works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import ds_kernels
import pytest

PACKAGE = Path(ds_kernels.__file__).parent
NAME = ds_kernels.__name__.split(".")  # more than one part in a vendored copy
ROOT = PACKAGE.parents[len(NAME) - 1]


def run(code: str, path: Path = ROOT) -> str:
    """Run ``code`` in a process of its own that imports the package from ``path``."""
    command = [sys.executable, "-W", "error", "-c", dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, env=env, cwd=path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def without_native(tmp_path) -> Path:
    """A folder with the package as an install without a compiler leaves it."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path.joinpath(*NAME), ignore=ignore)
    return tmp_path


def test_import_is_cheap_and_inert():
    run("""
        import os, sys, threading, time
        import torch
        modules, env = set(sys.modules), dict(os.environ)
        threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        start = time.process_time()
        import ds_kernels
        seconds = time.process_time() - start
        added = set(sys.modules) - modules
        assert len(added) <= 20, added
        assert "ds_kernels._native" not in sys.modules
        assert not [path for path in opened if path.endswith("entry_points.txt")], opened
        assert dict(os.environ) == env
        assert threading.active_count() == 1
        if threads:
            assert len(os.listdir("/proc/self/task")) == threads
        assert seconds < 0.05, seconds
    """)


def test_built_in_backends_are_chosen_without_a_scan():
    run("""
        import sys
        import torch, ds_kernels
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        ds_kernels.use_backend("reference")
        ds_kernels.registry().kernel("adamw", torch.device("cpu"), torch.float32)
        assert not [path for path in opened if path.endswith("entry_points.txt")], opened
        ds_kernels.backends()
        assert [path for path in opened if path.endswith("entry_points.txt")]
    """)


def test_torchs_openmp_runtime_is_shared(cpu):
    if not Path("/proc/self/maps").exists():
        pytest.skip("the list of mapped libraries is read from /proc")
    run("""
        import torch, ds_kernels
        x = torch.ones(1 << 17)
        torch.set_num_threads(2)
        x.add_(1)
        ds_kernels.CpuBackend().chunk_sumsq(x, 64)
        lines = open("/proc/self/maps").read().splitlines()
        runtimes = {line.split()[-1] for line in lines if "gomp" in line or "libomp" in line}
        assert len(runtimes) == 1, runtimes
    """)


def test_without_the_native_module_the_reference_steps_and_says_so_once(without_native):
    output = run(
        """
        import logging
        logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
        import torch, ds_kernels
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = ds_kernels.AdamW([weight], lr=0.5, weight_decay=0.0)
        for _ in range(3):
            weight.grad = torch.ones(2)
            optimizer.step()
        assert torch.allclose(weight, torch.tensor(-0.5))
        print(ds_kernels.__file__)
        """,
        without_native,
    )
    assert str(without_native) in output
    lines = [line for line in output.splitlines() if "WARNING" in line]
    assert len(lines) == 1
    assert lines[0].startswith("WARNING ds_kernels the kernel backend 'cpu' cannot run here: the native module")
    assert "using 'reference'" in lines[0]


def test_without_the_native_module_asking_for_it_is_an_error(without_native):
    run(
        """
        import torch, ds_kernels
        assert "is missing or broken" in ds_kernels.backends()["cpu"].unusable
        for ask in (
            lambda: ds_kernels.use_backend("cpu"),
            lambda: ds_kernels.CpuBackend().chunk_sumsq(torch.ones(64), 64),
        ):
            try:
                ask()
            except RuntimeError as error:
                assert "is missing or broken" in str(error), error
                assert "C++17 compiler" in str(error), error
            else:
                raise AssertionError("no error")
        """,
        without_native,
    )


def test_a_copy_under_another_name_works(tmp_path):
    vendored = tmp_path / "acme" / "_vendor"
    vendored.mkdir(parents=True)
    shutil.copytree(PACKAGE, vendored / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    run(
        """
        import logging, sys, torch
        logging.basicConfig(level="INFO", format="%(name)s")
        from acme._vendor.kernels import AdamW, registry
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        AdamW([weight]).step()
        from acme._vendor.kernels import plugin
        assert plugin.adamw.build(plugin.adamw.config_type(), type("Context", (), {"kernels": None}))
        assert not [name for name in sys.modules if name.startswith(("ds_kernels", "ds_core"))]
        """,
        tmp_path,
    )


def test_a_copy_with_its_native_module_works_beside_the_original(tmp_path, cpu):
    vendored = tmp_path / "acme" / "_vendor"
    vendored.mkdir(parents=True)
    shutil.copytree(PACKAGE, vendored / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    run(
        f"""
        import importlib, sys
        import torch
        sys.path.insert(0, {str(ROOT)!r})
        for name in ("acme._vendor.kernels", {".".join(NAME)!r}):
            package = importlib.import_module(name)
            assert package.backends()["cpu"].unusable is None, package.backends()["cpu"]
            kernels, x = package.CpuBackend(), torch.ones(64)
            assert kernels.chunk_sumsq(x, 64).item() == 64
        """,
        tmp_path,
    )
