"""Native codes that are there and do not load are warned of; those that were never built are not."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from ds_comm.codecs import native

CPU = torch.device("cpu")


def loaded(monkeypatch: pytest.MonkeyPatch, error: ImportError | None) -> object:
    def load(name: str, package: str | None = None) -> str:
        assert importlib.util.resolve_name(name, package) == "ds_comm._codes"
        if error is not None:
            raise error
        return "the module"

    monkeypatch.setattr(native.importlib, "import_module", load)
    native._load.cache_clear()
    try:
        return native.native_codes(CPU), native.native_codes(CPU)
    finally:
        native._load.cache_clear()


@pytest.mark.parametrize(
    ("error", "warnings"),
    [
        (None, []),
        (ModuleNotFoundError("No module named 'ds_comm._codes'", name="ds_comm._codes"), []),
        (ImportError("undefined symbol: _Z1f", name="ds_comm._codes"), ["undefined symbol: _Z1f"]),
        (ModuleNotFoundError("No module named 'other'", name="other"), ["No module named 'other'"]),
    ],
    ids=["there", "never built", "broken", "lacks something"],
)
def test_what_does_not_load_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: ImportError | None, warnings: list[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        found = loaded(monkeypatch, error)
    assert found == ((None, None) if error else ("the module", "the module"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(warnings)
    for message, cause in zip(messages, warnings, strict=True):
        assert f"ds_comm._codes are there and do not load ({cause})" in message
    assert native.native_codes(torch.device("meta")) is None
