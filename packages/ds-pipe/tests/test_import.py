"""Importing the wheel is cheap and inert, and needs nothing but torch."""

from __future__ import annotations

import sys

import ds_pipe
import pytest
from ds_testkit.imports import added_by_importing


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_importing_touches_nothing() -> None:
    added = [
        name for name in added_by_importing([ds_pipe.__name__]) if name.split(".")[0] not in sys.stdlib_module_names
    ]
    # torch imports some of its own parts late
    foreign = {name.split(".")[0] for name in added} - {"torch"}
    assert foreign == {ds_pipe.__name__.split(".")[0]}
