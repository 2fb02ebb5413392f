"""Fixtures of the testkit, found by pytest through its entry point."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from .processes import RankPool


def pytest_configure() -> None:
    """Let examples take their time: on a shared machine a deadline fails without a reason."""
    settings.register_profile("ds", deadline=None)
    settings.load_profile("ds")


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """Four processes joined by gloo; started at the first call.

    They have one thread each, and so has this process as long as they live: bits of torch's kernels depend on it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = RankPool(4, str(pytestconfig.rootpath))
    yield pool
    pool.close()
    torch.set_num_threads(threads)
