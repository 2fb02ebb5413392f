"""Bytes on the wire between two network namespaces, as the kernel counts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from ds_testkit import slow_link

from . import slow_program

# two ranks: half of what it is on many
EACH_WAY = {"1-bit Adam": 0.134, "1-bit Adam, sign": 0.134, "1-bit LAMB": 0.134, "0/1 Adam": 0.134, "int4": 0.534}


def test_the_kernel_counts_what_is_accounted() -> None:
    reason = slow_link.unusable()
    if reason is not None:
        pytest.skip(reason)
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    with slow_link.SlowLink("1gbit") as link:
        first, _ = link.run([sys.executable, "-W", "ignore", str(Path(slow_program.__file__))], env)
    elements = slow_program.NUMEL * slow_program.STEPS
    for name, counts in first.items():
        assert counts["accounted"] == pytest.approx(counts["kernel"], rel=0.03), name
        assert counts["accounted"] / elements <= EACH_WAY.get(name, 4.0), name
    assert first["warm-up"]["accounted"] == 4 * elements
    assert first["local steps"]["accounted"] == pytest.approx(first["int4"]["accounted"] / 2, rel=0.01)
