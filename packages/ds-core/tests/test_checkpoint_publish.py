"""A save publishes all or nothing: wrong states, errors on one rank, existing tags, leftovers."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

import pytest
import torch
from ds_core.checkpoint import RankError, load_full, open_checkpoint, save, verify
from ds_core.checkpoint.filesystem import LocalFilesystem
from ds_core.checkpoint.lock import DirectoryLock

from .checkpoint_kit import TINY, Held, State, deal, run_ranks, save_one, save_ranks, whole

ONE = {"param/w": torch.ones(10)}
TWO = {"param/w": torch.full((10,), 2.0)}
SHAPE = torch.Size([10])


def piece(start, end, *, name="w", role="param", shape=SHAPE, dtype=torch.float32):
    return Held(name, role, shape, start, torch.zeros(end - start, dtype=dtype))


def visible(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("existing", ["checkpoint", "file", "empty folder", "dangling link"])
def test_an_existing_tag_is_a_value_error_on_every_rank_and_stays_as_it_is(tmp_path, existing):
    target = tmp_path / "a"
    if existing == "checkpoint":
        save_one(tmp_path, "a", ONE)
    elif existing == "file":
        target.write_text("mine")
    elif existing == "empty folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    before = visible(tmp_path)
    for result in save_ranks(tmp_path, "a", deal(TWO, 2, [5])):
        assert type(result) is ValueError
        assert f"{target} exists, and checkpoints are never overwritten: save under another tag" in str(result)
    assert visible(tmp_path) == before
    assert existing != "checkpoint" or load_full(target)["w"].tolist() == [1.0] * 10


SHAPES = {"w": SHAPE}
WRONG_STATES = {
    "gap": (
        [State([piece(0, 4)], SHAPES, {}), State([piece(7, 10)], SHAPES, {})],
        "param/w of shape [10]: elements [4, 7) stand in no piece",
    ),
    "end missing": (
        [State([piece(0, 9)], SHAPES, {})],
        "param/w of shape [10]: elements [9, 10) stand in no piece",
    ),
    "overlap": (
        [State([piece(0, 6)], SHAPES, {}), State([piece(4, 10)], SHAPES, {})],
        "param/w of shape [10]: elements [4, 6) stand in more than one piece, "
        "in shard-00000-00.safetensors, shard-00001-00.safetensors",
    ),
    "twice on one rank": (
        [State([piece(0, 10), piece(0, 10)], SHAPES, {})],
        "param/w of shape [10]: elements [0, 4) stand in more than one piece",
    ),
    "optimizer gap": (
        [State([piece(0, 10), piece(0, 3, role="exp_avg")], SHAPES, {})],
        "exp_avg/w of shape [10]: elements [3, 10) stand in no piece",
    ),
    "no piece at all": (
        [State([piece(0, 10)], {**SHAPES, "v": torch.Size([1, 2])}, {})],
        "v of shape [1, 2] is part of the model, but no rank has a piece of it",
    ),
    "not of the model": (
        [State([piece(0, 10), piece(0, 10, name="v")], SHAPES, {})],
        "param/v has pieces, but is not among the model's shapes",
    ),
    "model says another shape": (
        [State([piece(0, 10)], {"w": torch.Size([2, 5])}, {})],
        "param/w has shape [10], the model's shapes say [2, 5]",
    ),
    "ranks say other types": (
        [State([piece(0, 5)], SHAPES, {}), State([piece(5, 10, dtype=torch.float64)], SHAPES, {})],
        "param/w: one rank has it as F32 of shape [10], another as F64 of shape [10]",
    ),
    "ranks say other models": (
        [State([piece(0, 10)], SHAPES, {}), State([], {"w": torch.Size([5, 2])}, {})],
        "w: rank 1 says shape [5, 2], a lower rank [10]",
    ),
    "ranks say other scalars": (
        [
            State([piece(0, 10)], SHAPES, {"optimizer": {"lr": 1.0, "step": 3}}),
            State([], SHAPES, {"optimizer": {"lr": 2.0, "step": 3}}),
        ],
        "rank 1: scalar optimizer.lr is 2.0, on a lower rank 1.0",
    ),
    "beyond the tensor": (
        [State([piece(5, 12)], SHAPES, {})],
        "a 1D interval of its tensor; param/w has 10 elements, got data of shape [7] from element 5 on",
    ),
    "not 1D": (
        [State([Held("w", "param", SHAPE, 0, torch.zeros(2, 5))], SHAPES, {})],
        "param/w has 10 elements, got data of shape [2, 5] from element 0 on",
    ),
    "type without a name": (
        [State([piece(0, 10, dtype=torch.complex128)], SHAPES, {})],
        "got torch.complex128: convert the tensor to one of them",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_a_state_that_is_not_whole_is_refused_on_every_rank_and_leaves_nothing(tmp_path, case):
    states, message = WRONG_STATES[case]
    for result in save_ranks(tmp_path, "a", states):
        assert type(result) is (RankError if len(states) > 1 else ValueError)
        assert "ValueError" in repr(result)
        assert message in str(result)
    assert visible(tmp_path) == []


def test_scalars_that_only_some_ranks_know_are_saved(tmp_path):
    known = [{"class": "Adam", "counters": {}}, {"class": "Adam", "counters": {"step": 3, "best": float("nan")}}]
    known += [known[1], {}]
    states = [State([piece(0, 10)] if rank == 0 else [], SHAPES, scalars) for rank, scalars in enumerate(known)]
    assert save_ranks(tmp_path, "a", states) == [tmp_path / "a"] * 4
    scalars = open_checkpoint(tmp_path).scalars
    assert (scalars["class"], scalars["counters"]["step"]) == ("Adam", 3)
    assert scalars["counters"]["best"] != scalars["counters"]["best"]


class WritesNothing(LocalFilesystem):
    """Must not be asked to."""

    def create(self, path):
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("where", ["run", "scalars"])
def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path, where):
    given = {"run": {}, "scalars": {}, where: {"x": torch.ones(1)}}
    state = whole(ONE, given["scalars"])
    (result,) = save_ranks(tmp_path, "a", [state], run=given["run"], filesystem=WritesNothing())
    assert type(result) is TypeError
    assert str(result) == "Object of type Tensor is not JSON serializable"
    assert visible(tmp_path) == []


class FullDisk(LocalFilesystem):
    """Has no room for data of one rank."""

    def __init__(self, rank):
        self.rank = rank

    def write(self, file, data):
        if Path(file.name).name.startswith(f"shard-{self.rank:05d}-01"):
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(file, data)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all_and_leaves_the_directory_as_it_was(tmp_path, rank):
    save_one(tmp_path, "a", ONE)
    states = deal({"param/w": torch.arange(100.0)}, 3, [30, 60])
    for result in save_ranks(tmp_path, "b", states, filesystem=FullDisk(rank)):
        assert type(result) is RankError
        assert str(result) == f"rank {rank}: OSError: [Errno 28] No space left on device"
    assert visible(tmp_path) == ["a", "latest"]
    assert open_checkpoint(tmp_path).tag == "a"
    assert save_ranks(tmp_path, "b", states) == [tmp_path / "b"] * 3


def test_a_directory_that_one_rank_does_not_see_is_told(tmp_path):
    states = deal(ONE, 2, [5])

    def body(control):
        directory = tmp_path / f"node{control.rank}"
        return save(directory, "a", state=states[control.rank], run={}, control=control)

    for result in run_ranks(2, body):
        assert type(result) is RankError
        assert "rank 1: RuntimeError" in str(result)
        assert "is not visible here: save into a directory that all ranks share" in str(result)
    assert visible(tmp_path / "node0") == []


def test_a_directory_that_cannot_be_made_is_told_to_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    for result in save_ranks(tmp_path / "file/dir", "a", deal(ONE, 2, [5])):
        assert type(result) is RankError
        assert "rank 0: NotADirectoryError" in str(result)


def test_missing_parents_of_the_directory_are_made(tmp_path):
    save_one(tmp_path / "x/y/z", "a", ONE)
    assert open_checkpoint(tmp_path / "x/y/z").tag == "a"


class LosesLatest(LocalFilesystem):
    """Cannot replace ``latest``."""

    def rename(self, source, target):
        if target.name == "latest":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        super().rename(source, target)


def test_a_checkpoint_published_without_its_announcement_is_still_found(tmp_path, caplog):
    save_one(tmp_path, "a", ONE)
    with pytest.raises(
        RuntimeError, match=r"b is whole and can be loaded, but making 'latest' name it failed: .*permitted"
    ):
        save_one(tmp_path, "b", TWO, filesystem=LosesLatest())
    assert (tmp_path / "latest").read_text().strip() == "a"
    assert open_checkpoint(tmp_path).tag == "b"
    assert "'latest' names a: a newer checkpoint was saved, but the save ended before renewing it" in caplog.text
    assert verify(tmp_path / "b") == []


@pytest.mark.parametrize("by", ["a later save", "a person"])
def test_an_old_announcement_does_not_outlive_a_new_latest(tmp_path, by):
    for tag in ["z", "a"]:
        save_one(tmp_path, tag, ONE)
    with pytest.raises(RuntimeError, match="is whole and can be loaded"):
        save_one(tmp_path, "b", TWO, filesystem=LosesLatest())
    if by == "a person":
        (tmp_path / "latest").write_text("z")
        assert open_checkpoint(tmp_path).tag == "z"
    else:
        save_one(tmp_path, "c", ONE)
        assert open_checkpoint(tmp_path).tag == "c"
        assert visible(tmp_path) == ["a", "b", "c", "latest", "z"]


@pytest.fixture
def leftovers(tmp_path):
    """What two killed saves left."""
    (tmp_path / ".tmp-b-0123").mkdir()
    (tmp_path / ".tmp-b-0123/shard-00000-00.safetensors").write_bytes(b"half")
    (tmp_path / ".latest-4567").write_text("b")
    return [".latest-4567", ".tmp-b-0123"]


def test_leftovers_go_with_the_next_successful_save(tmp_path, leftovers):
    with pytest.raises(ValueError, match=r"torch\.complex128"):
        save_one(tmp_path, "a", {"param/w": torch.zeros(1, dtype=torch.complex128)})
    assert visible(tmp_path) == leftovers
    save_one(tmp_path, "a", ONE)
    assert visible(tmp_path) == ["a", "latest"]


def test_leftovers_stay_while_another_save_is_alive(tmp_path, leftovers):
    with DirectoryLock(tmp_path):
        save_one(tmp_path, "a", ONE)
        assert visible(tmp_path) == [*leftovers, "a", "latest"]
    save_one(tmp_path, "c", ONE)
    assert visible(tmp_path) == ["a", "c", "latest"]


def test_leftovers_stay_with_a_warning_where_there_are_no_locks(tmp_path, leftovers, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    save_one(tmp_path, "a", ONE)
    assert visible(tmp_path) == [*leftovers, "a", "latest"]
    assert "this filesystem has no locks" in caplog.text


def test_another_failure_of_the_lock_is_an_error(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        save_one(tmp_path, "a", ONE)


class CannotRemove(LocalFilesystem):
    """Keeps what it has."""

    def remove(self, path):
        raise OSError(errno.EBUSY, "Device or resource busy")


def test_a_leftover_that_cannot_be_removed_is_a_warning_not_a_failed_save(tmp_path, leftovers, caplog):
    save_one(tmp_path, "a", ONE, filesystem=CannotRemove())
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "leftovers of killed saves stay in" in record.getMessage()
    assert open_checkpoint(tmp_path).tag == "a"


def test_a_failed_draft_that_cannot_be_removed_does_not_hide_the_error(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.complex128"):
        save_one(tmp_path, "a", {"param/w": torch.zeros(1, dtype=torch.complex128)}, filesystem=CannotRemove())
    save_one(tmp_path, "a", ONE)
    assert visible(tmp_path) == ["a", "latest"]


def test_two_saves_into_one_directory_at_once_both_succeed(tmp_path):
    inner = whole(TWO)

    class SavesInside(LocalFilesystem):
        def create(self, path):
            if path.name == "manifest.json":
                save_ranks(tmp_path, "inner", [inner])
            return super().create(path)

    save_ranks(tmp_path, "outer", [whole(ONE)], filesystem=SavesInside(), config=TINY)
    assert visible(tmp_path) == ["inner", "latest", "outer"]
    assert verify(tmp_path / "inner") == verify(tmp_path / "outer") == []
    assert open_checkpoint(tmp_path).tag == "outer"
