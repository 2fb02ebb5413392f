"""Freed memory that is kept costs no pages again."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ds_pipe import host_memory

PROGRAM = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("host_memory", sys.argv[1])
host_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host_memory)
if sys.argv[2] == "keep":
    host_memory.keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    kept = [bytearray(size << 20) for size in (1, 48, 8, 2)]
    kept.pop(0)

step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def pages(what: str) -> int:
    program = [sys.executable, "-c", PROGRAM, host_memory.__file__, what]
    return int(subprocess.run(program, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    assert pages("keep") < 1000
    assert pages("return") > 4 * (48 << 20) // 65536  # the largest one at least, each time, in pages of up to 64 KiB


def test_without_glibc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _name: object())
    with pytest.raises(RuntimeError, match="freed memory can be kept with glibc only"):
        host_memory.keep_freed_memory()


@pytest.mark.parametrize(("most", "told"), [(1 << 30, []), (1 << 25, ["32 MiB only"])])
def test_it_takes_what_glibc_allows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int, told: list[str]
) -> None:
    asked: dict[int, int] = {}

    class Library:
        def mallopt(self, what: int, value: int) -> int:
            if value > most:
                return 0
            asked[what] = value
            return 1

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _name: Library())
    host_memory.keep_freed_memory()
    assert asked == {-1: -1, -3: most}
    assert len(caplog.messages) == len(told)
    assert all(part in text for part, text in zip(told, caplog.messages))


def test_nothing_is_changed_when_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        def mallopt(self, what: int, _value: int) -> int:
            asked.append(what)
            return 0

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _name: Library())
    with pytest.raises(RuntimeError, match="has refused"):
        host_memory.keep_freed_memory()
    assert set(asked) == {-3}
