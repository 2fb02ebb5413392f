"""Fixtures of the testkit, found by pytest through its entry point."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .processes import RankPool


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """Four processes joined by gloo; started at the first call."""
    pool = RankPool(4, str(pytestconfig.rootpath))
    yield pool
    pool.close()
