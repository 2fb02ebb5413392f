"""``ds report``: what is here, and what of it can be used."""

import json
import sys
import textwrap

import pytest
import torch
from click.testing import CliRunner
from ds_core.cli import main

KERNELS = """
    class Backend:
        name = "slow"

        def unusable(self):
            return "no such unit in this CPU"

    class Plugin:
        role_version = 1
        config_type = None

        def build(self, config, context):
            return {result}

    plugin = Plugin()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a wheel with one plugin, for the length of a test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(module, group, source):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 3.1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}:plugin\n")

    yield make
    for name in ("acme", "broken"):
        sys.modules.pop(name, None)


def report():
    result = CliRunner().invoke(main, ["report", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def row(found, name):
    (only,) = [each for each in found["plugins"] if each["name"] == name]
    return only


def test_versions_and_devices():
    found = report()
    assert found["torch"] == torch.__version__
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert len(found["devices"]) == torch.cuda.device_count()


def test_each_wheel_has_a_row_of_its_own():
    assert {"ds-core", "ds-kernels", "ds-zero"} <= set(report()["wheels"])
    assert not [name for name in report()["wheels"] if " " in name]


def test_a_usable_plugin(install):
    install("acme", "ds.store", "class plugin:\n    role_version = 1\n    config_type = None\n")
    found = report()
    assert row(found, "acme") == {
        "group": "ds.store",
        "name": "acme",
        "wheel": "acme 3.1",
        "target": "acme:plugin",
        "problem": None,
    }
    assert found["wheels"]["acme"] == "3.1"


def test_a_plugin_that_cannot_be_imported_says_why(install):
    install("broken", "ds.monitor", "import no_such_module")
    assert "No module named 'no_such_module'" in row(report(), "broken")["problem"]


@pytest.mark.parametrize(
    ("result", "problem"),
    [("Backend()", "no such unit in this CPU"), ("int('x')", "ValueError: invalid literal for int()")],
)
def test_a_kernel_backend_says_why_it_cannot_run(install, result, problem):
    install("acme", "ds.kernels", KERNELS.replace("{result}", result))
    assert row(report(), "acme")["problem"].startswith(problem)


def test_tables_hold_the_same(install):
    install("broken", "ds.monitor", "1 / 0")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["report"])
    assert result.exit_code == 0, result.output
    for text in (torch.__version__, "ds-zero", "ds.monitor", "ZeroDivisionError"):
        assert text in result.stdout
