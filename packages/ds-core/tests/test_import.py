"""Importing the wheel is cheap and inert."""

import subprocess
import sys

import pytest
from ds_testkit.imports import added_by_importing

MODULES = [
    "ds_core",
    "ds_core.config",
    "ds_core.loss_scale",
    "ds_core.optimizers",
    "ds_core.registry",
    "ds_core.schedules",
]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("names", [["ds_core"], MODULES], ids=["root", "parts"])
def test_importing_touches_nothing_and_adds_few_modules(names):
    added = added_by_importing(names)
    assert len(added) <= 40, added
    foreign = {name.split(".")[0] for name in added} - sys.stdlib_module_names
    assert foreign == {MODULES[0].split(".")[0]}


def test_the_command_line_imports_neither_torch_nor_pydantic():
    code = "import sys; import ds_core.cli; bad = {'torch', 'pydantic', 'rich'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
