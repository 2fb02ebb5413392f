"""Importing the wheel is cheap and inert."""

import subprocess
import sys

import pytest

MODULES = [
    "ds_core",
    "ds_core.config",
    "ds_core.loss_scale",
    "ds_core.optimizers",
    "ds_core.registry",
    "ds_core.schedules",
]

CODE = """
import importlib, json, os, sys, threading
import torch

touched = []
def hook(event, args):
    if event == "open" and str(args[0]).endswith(("entry_points.txt", "METADATA")):
        touched.append(str(args[0]))
    if event in ("socket.connect", "subprocess.Popen", "os.fork", "os.putenv", "os.unsetenv"):
        touched.append(event)

before, threads, environment = set(sys.modules), len(os.listdir("/proc/self/task")), dict(os.environ)
sys.addaudithook(hook)
for name in sys.argv[1].split(","):
    importlib.import_module(name)
assert touched == [], touched
assert dict(os.environ) == environment
assert len(os.listdir("/proc/self/task")) == threads and threading.active_count() == 1
assert not torch.cuda.is_initialized()
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("names", [["ds_core"], MODULES], ids=["root", "parts"])
def test_importing_touches_nothing_and_adds_few_modules(names):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, ",".join(names)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    added = result.stdout.split()
    assert len(added) <= 40, added
    foreign = {name.split(".")[0] for name in added} - sys.stdlib_module_names
    assert foreign == {"ds_core"}


def test_the_command_line_imports_neither_torch_nor_pydantic():
    code = "import sys; import ds_core.cli; bad = {'torch', 'pydantic', 'rich'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
