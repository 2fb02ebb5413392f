"""The command ``ds comm``."""

import pytest
from ds_comm.commands import main


def test_the_name_of_a_command_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["test"])
    assert "choose from" in capsys.readouterr().err


def test_each_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "usage: ds comm bench" in capsys.readouterr().out
