"""A save stopped before any of its steps, with and without loss of power, never costs the last checkpoint.

The disk below keeps a book of what was synced. A crash of the process loses nothing that was written; a loss
of power may lose everything that was not synced: contents of files, and names in folders.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ds_core._control import SingleControl
from ds_core.checkpoint import CheckpointError, load_full, open_checkpoint, published_tags, save, verify
from ds_core.checkpoint.filesystem import LocalFilesystem

from .checkpoint_kit import TINY, deal, run_ranks, whole

LOSSES = ["nothing", "contents", *(f"names {mask:03b}" for mask in range(1, 8))]
"""Which of the last three names not synced are lost is a bit each; earlier ones share these bits in turn."""


class Crash(BaseException):
    """The process or the machine is gone."""


class Change(NamedTuple):
    """A name given or taken, not yet certain to survive."""

    folders: set[Path]  # to be synced before it is certain
    path: Path
    source: Path | None  # of a rename
    replaced: bytes | None  # contents of the file that a rename replaced


class Disk(LocalFilesystem):
    """Runs the first ``num_steps`` steps, then none; knows what a loss of power would take."""

    def __init__(self, num_steps: int = 10**9, *, syncs: bool = True) -> None:
        self.num_steps = num_steps
        self.num_done = 0
        self.syncs = syncs
        self.dirty: set[int] = set()  # inodes
        self.changes: list[Change] = []

    def _step(self) -> None:
        if self.num_done == self.num_steps:
            raise Crash
        self.num_done += 1

    def make_folder(self, path):
        self._step()
        super().make_folder(path)
        self.changes.append(Change({path.parent}, path, None, None))

    def create(self, path):
        self._step()
        self.changes.append(Change({path.parent}, path, None, None))
        return super().create(path)

    def write(self, file, data):
        self.dirty.add(os.fstat(file.fileno()).st_ino)
        if self.num_done == self.num_steps:
            super().write(file, memoryview(data)[: len(data) // 2])  # a write may be cut in the middle
        self._step()
        super().write(file, data)

    def sync(self, file):
        self._step()
        if self.syncs:
            self.dirty.discard(os.fstat(file.fileno()).st_ino)

    def sync_folder(self, path):
        self._step()
        if self.syncs:
            for change in self.changes:
                change.folders.discard(path)

    def rename(self, source, target):
        self._step()
        replaced = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self.changes.append(Change({target.parent}, target, source, replaced))

    def remove(self, path):
        self._step()
        super().remove(path)

    def lose(self, loss: str, root: Path) -> None:
        """Change the real directory to what could be found after the crash."""
        if loss.startswith("names"):
            self._lose_names(int(loss.split()[1], base=2))
        if loss != "nothing":
            for path in root.rglob("*"):
                if path.is_file() and path.stat().st_ino in self.dirty:
                    os.truncate(path, path.stat().st_size // 2)

    def _lose_names(self, mask: int) -> None:
        kept_renames: list[tuple[Path, Path]] = []
        bits = itertools.cycle([mask & 1, mask & 2, mask & 4])
        for change in reversed(self.changes):
            path = change.path
            if not change.folders or not next(bits):
                if change.source is not None:
                    kept_renames.insert(0, (change.source, path))
                continue
            for source, target in kept_renames:
                path = target / path.relative_to(source) if path.is_relative_to(source) else path
            if path != change.path and path in dict(kept_renames).values():
                continue  # renamed since, and the new name is kept
            if change.source is not None:
                path.rename(change.source)
                if change.replaced is not None:
                    path.write_bytes(change.replaced)
            else:
                LocalFilesystem().remove(path)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"param/w": torch.full((12,), float(step)), "exp_avg/w": torch.full((12,), -float(step))}


def save_step(directory: Path, step: int, disk: LocalFilesystem) -> None:
    tag = f"global_step{step}"
    state = whole(tensors_of(step))
    save(directory, tag, state=state, run={"step": step}, control=SingleControl(), config=TINY, filesystem=disk)


def check_last(directory: Path, allowed: set[int]) -> int:
    """The last checkpoint is whole and is that of an allowed step; return it."""
    checkpoint = open_checkpoint(directory)
    step = checkpoint.run["step"]
    assert step in allowed
    latest = (directory / "latest").read_text().strip() if (directory / "latest").exists() else None
    assert latest in {None, *published_tags(directory)}
    for tag in published_tags(directory):
        assert verify(directory / tag) == []
    assert torch.equal(load_full(checkpoint.path)["w"], tensors_of(step)["param/w"])
    assert torch.equal(load_full(checkpoint.path, "exp_avg")["w"], tensors_of(step)["exp_avg/w"])
    return step


def count_steps(directory: Path) -> int:
    disk = Disk()
    save_step(directory, 2, disk)
    return disk.num_done


def stop(directory: Path, num_steps: int, loss: str, **options) -> bool:
    """Save step 2 until the crash; return whether the save had returned before it."""
    disk = Disk(num_steps, **options)
    try:
        save_step(directory, 2, disk)
    except Crash:
        returned = False
    else:
        returned = True
    disk.lose(loss, directory)
    return returned


@pytest.fixture
def first(tmp_path):
    """A directory with the checkpoint of step 1, and what a killed save left there."""
    save_step(tmp_path / "first", 1, LocalFilesystem())
    (tmp_path / "first/.tmp-global_step2-0123").mkdir()
    return tmp_path / "first"


@pytest.mark.parametrize("loss", LOSSES)
def test_a_stop_at_any_step_leaves_the_old_or_the_new_checkpoint_and_the_run_goes_on(tmp_path, first, loss):
    total = count_steps(shutil.copytree(first, tmp_path / "count"))
    assert total > 20
    for num_steps in range(total + 1):
        directory = shutil.copytree(first, tmp_path / f"stop{num_steps}")
        returned = stop(directory, num_steps, loss)
        assert returned == (num_steps == total)
        step = check_last(directory, {2} if returned else {1, 2})
        assert not returned or (directory / "latest").read_text() == "global_step2\n"
        # Training resumes from there and saves again, also under the tag of the save that was stopped.
        save_step(directory, step + 1, LocalFilesystem())
        assert check_last(directory, {step + 1})
        steps = {1, step, step + 1}
        assert sorted(path.name for path in directory.iterdir()) == sorted(
            [".lock", "latest", *(f"global_step{s}" for s in steps)]
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_stop_of_the_first_save_leaves_nothing_or_all_of_it(tmp_path, loss):
    total = count_steps(tmp_path / "count/dir")
    for num_steps in range(total + 1):
        directory = tmp_path / f"stop{num_steps}/dir"
        directory.parent.mkdir()
        returned = stop(directory, num_steps, loss)
        try:
            step = check_last(directory, {2})
        except CheckpointError:
            assert not returned
            assert published_tags(directory) == []
            step = 1
        save_step(directory, step + 1, LocalFilesystem())
        check_last(directory, {step + 1})


def test_both_outcomes_occur_and_the_new_one_before_the_save_returns(tmp_path, first):
    total = count_steps(shutil.copytree(first, tmp_path / "count"))
    found = []
    for num_steps in range(total):
        directory = shutil.copytree(first, tmp_path / f"stop{num_steps}")
        stop(directory, num_steps, "nothing")
        found.append(check_last(directory, {1, 2}))
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_the_model_of_the_disk_notices_when_nothing_is_synced(tmp_path, first):
    for loss, expected in [("contents", CheckpointError), ("names 111", AssertionError)]:
        directory = shutil.copytree(first, tmp_path / loss)
        assert stop(directory, 10**9, loss, syncs=False)
        if expected is CheckpointError:
            with pytest.raises(CheckpointError):
                open_checkpoint(directory, "global_step2")
        else:
            with pytest.raises(AssertionError):
                check_last(directory, {2})


def test_an_error_at_any_step_leaves_a_whole_checkpoint_or_none(tmp_path, first):
    """Like a crash, but the process lives on and tidies up."""

    class FailsOnce(LocalFilesystem):
        def __init__(self, failing):
            self.failing = failing
            self.num_calls = 0

        def __getattribute__(self, name):
            attribute = super().__getattribute__(name)
            if name not in {"make_folder", "create", "write", "sync", "sync_folder", "rename"}:
                return attribute

            def call(*arguments):
                self.num_calls += 1
                if self.num_calls == self.failing:
                    raise OSError(28, "No space left on device")
                return attribute(*arguments)

            return call

    counter = FailsOnce(0)
    save_step(shutil.copytree(first, tmp_path / "count"), 2, counter)
    for failing in range(1, counter.num_calls + 1):
        directory = shutil.copytree(first, tmp_path / f"fail{failing}")
        with pytest.raises((OSError, RuntimeError), match=r"No space left on device"):
            save_step(directory, 2, FailsOnce(failing))
        step = check_last(directory, {1, 2})
        drafts = [path.name for path in directory.iterdir() if path.name.startswith((".tmp-", ".latest-"))]
        left_before = ".tmp-global_step2-0123"
        assert [name for name in drafts if name != left_before and step == 1] == []
        save_step(directory, step + 1, LocalFilesystem())


def test_every_rank_syncs_what_it_wrote_itself(tmp_path):
    states = deal(tensors_of(2), 3, [3, 5, 9])
    disks = [Disk() for _ in states]

    def body(control):
        options = {"state": states[control.rank], "config": TINY, "filesystem": disks[control.rank]}
        return save(tmp_path, "global_step2", run={"step": 2}, control=control, **options)

    assert run_ranks(3, body) == [tmp_path / "global_step2"] * 3
    for disk in disks:
        assert disk.changes
        assert not disk.dirty
        assert not any(change.folders for change in disk.changes)


def test_the_death_of_one_rank_ends_the_others_and_costs_nothing(tmp_path, first):
    states = deal(tensors_of(2), 2, [5])

    def body(control):
        disk = Disk(3 if control.rank == 1 else 10**9)
        options = {"run": {"step": 2}, "config": TINY, "filesystem": disk}
        try:
            return save(first, "global_step2", state=states[control.rank], control=control, **options)
        except Crash as crash:
            raise RuntimeError("killed") from crash

    results = run_ranks(2, body)
    assert all(isinstance(result, RuntimeError) for result in results)
    assert check_last(first, {1}) == 1
    save_step(first, 2, LocalFilesystem())
    assert check_last(first, {2}) == 2
