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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--min", "0"], "--min must be at least 4; got 0"),
        (["bench", "--factor", "1"], "--factor must be at least 2; got 1"),
        (["bench", "--ranks", "0"], "--ranks must be at least 1; got 0"),
        (["probe", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["probe", "--ranks", "-1"], "--ranks must be at least 1; got -1"),
    ],
)
def test_numbers_without_sense_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
