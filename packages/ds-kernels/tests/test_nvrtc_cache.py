"""Compiled kernels on disk: kept, shared, made again when damaged, done without when the folder is not to be had."""

from __future__ import annotations

import logging
import re
import threading

import pytest
from ds_kernels._env import CACHE_VARIABLE, cache_folder
from ds_kernels.backends.nvrtc.cache import KernelCache
from ds_kernels.backends.nvrtc.compiler import cache_key
from ds_kernels.backends.nvrtc.driver import missing_driver
from ds_kernels.backends.nvrtc.kernel import FORMATS, Kernel
from ds_kernels.backends.nvrtc.launcher import cuda_launcher
from ds_kernels.backends.nvrtc.reductions import tree_sum_kernel

KERNEL = tree_sum_kernel(*list(FORMATS)[:2])


class Maker:
    def __init__(self, *made):
        self.made = list(made)

    def __call__(self):
        return self.made.pop(0)


def test_what_is_kept_is_not_made_again(tmp_path):
    maker = Maker(b"first", b"second")
    for _ in range(2):
        assert KernelCache(tmp_path / "new").get("key", maker) == b"first"
    assert KernelCache(tmp_path / "new").get("other", maker) == b"second"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["key.cubin", "other.cubin"]


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"x"])
def test_a_damaged_file_is_made_again_and_said_so(tmp_path, caplog, damage):
    KernelCache(tmp_path).get("key", Maker(b"machine code"))
    path = tmp_path / "key.cubin"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert KernelCache(tmp_path).get("key", Maker(b"again")) == b"again"
    assert [re.sub(r"/\S*/", "", message) for message in caplog.messages] == [
        "the compiled kernel key.cubin is damaged; compiling it again"
    ]
    assert KernelCache(tmp_path).get("key", Maker()) == b"again"


def test_a_folder_that_cannot_be_written_is_said_once_each(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert KernelCache(tmp_path / "file" / "cache").get("key", Maker(b"made")) == b"made"
    assert f"set {CACHE_VARIABLE} to a folder that can be written" in caplog.text


def test_processes_that_start_together_see_whole_files(tmp_path):
    content = b"x" * 1_000_000
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(KernelCache(tmp_path).get("key", lambda: content)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [content] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["key.cubin"]


def test_the_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_folder() is None
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ds-kernels"


def test_the_key_names_what_decides_the_machine_code():
    keys = {cache_key(KERNEL, "sm_90"), cache_key(KERNEL, "sm_80"), cache_key(Kernel(*KERNEL[:3], 128), "sm_90")}
    assert len(keys) == 3
    assert all(re.fullmatch(r"tree_sum_Float32_BFloat16-sm_\d+-[0-9a-f]{32}", key) for key in keys)


def test_without_a_driver_the_reason_is_said():
    if missing_driver() is None:
        pytest.skip("there is a driver")
    assert cuda_launcher().unusable().startswith("no NVIDIA driver is installed (libcuda.so.1")
