"""Commands that other wheels bring."""

import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner
from ds_core.cli import main

SOURCE = """
    def main(arguments):
        print("acme got", arguments)
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "acme_tools.py").write_text(textwrap.dedent(SOURCE))
    info = tmp_path / "acme_tools-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tools\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[ds.commands]\nacme = acme_tools:main\nconfig = acme_tools:main\n")


@pytest.mark.usefixtures("acme")
def test_arguments_reach_the_wheel_untouched() -> None:
    result = CliRunner().invoke(main, ["acme", "plan", "--stages", "4", "--help"])
    assert result.exit_code == 0, result.output
    assert result.output == "acme got ['plan', '--stages', '4', '--help']\n"


@pytest.mark.usefixtures("acme")
def test_help_lists_it_without_importing_it() -> None:
    sys.modules.pop("acme_tools", None)
    result = CliRunner().invoke(main, ["--help"])
    assert "acme" in result.output
    assert "Commands of acme-tools." in result.output
    assert "acme_tools" not in sys.modules


@pytest.mark.usefixtures("acme")
def test_our_own_commands_are_not_replaced() -> None:
    assert "acme got" not in CliRunner().invoke(main, ["config", "--help"]).output


def test_what_is_not_there_is_said() -> None:
    result = CliRunner().invoke(main, ["acme"])
    assert result.exit_code != 0
    assert "No such command 'acme'" in result.output
