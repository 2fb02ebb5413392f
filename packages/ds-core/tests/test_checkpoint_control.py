"""Messages between ranks: one process, and two real ones over gloo, that also save together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ds_core
import pytest
import torch
import torch.distributed as dist
from ds_core._control import RankError, make_control, raise_errors, together
from ds_core.checkpoint import SaveConfig, load_full, open_checkpoint, save, verify

VALUE = {"text": "\u00e9\u4e2d", "list": [1, 2.5, None, True], "empty": {}}
NUMEL = 1000


def test_a_single_process_hears_itself():
    control = make_control(None)
    assert (control.rank, control.size) == (0, 1)
    assert control.gather(VALUE) == [VALUE]
    assert control.broadcast(VALUE) == VALUE
    control.all_ok(None)
    with pytest.raises(RankError, match="rank 0: disk full"):
        control.all_ok("disk full")


def test_together_lets_success_pass_and_keeps_the_error():
    with together(make_control(None)):
        pass
    # a process that works alone raises what was raised
    with pytest.raises(KeyError, match="x"), together(make_control(None)):
        raise KeyError("x")


def test_together_raises_one_public_error_on_several_ranks():
    def body(control):
        with together(control):
            if control.rank == 1:
                raise KeyError("x")

    from .checkpoint_kit import run_ranks

    first, second = run_ranks(2, body)
    assert type(first) is type(second) is ds_core.RankError
    assert str(first) == str(second) == "rank 1: KeyError: 'x'"
    assert isinstance(second.__context__, KeyError)


def test_ranks_with_one_error_share_a_line():
    with pytest.raises(RankError) as caught:
        raise_errors(["late", None, "full", "full"])
    assert str(caught.value) == "rank 0: late\nranks 2, 3: full"
    raise_errors([None, None])


def error_of(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (RankError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def speak_and_save(control, directory):
    """What each of the two processes does; returns what it saw."""
    half = NUMEL // 2
    piece = SimpleNamespace(name="w", role="param", shape=torch.Size([NUMEL]), start=control.rank * half)
    piece.data = torch.arange(NUMEL, dtype=torch.float32)[piece.start : piece.start + half]
    state = SimpleNamespace(pieces=[piece], shapes={"w": piece.shape}, scalars={"lr": 0.1})
    options = {"state": state, "run": {"rank": control.rank}, "control": control}
    small = SaveConfig(part_bytes=1024, piece_bytes=256)
    broken = SimpleNamespace(**{**vars(piece), "data": piece.data.to(torch.complex128)})
    half_broken = SimpleNamespace(**{**vars(state), "pieces": [piece if control.rank == 0 else broken]})
    return {
        "gathered": control.gather([control.rank, "x" * (100_000 * control.rank), VALUE]),
        "heard": control.broadcast(VALUE if control.rank == 0 else "ignored"),
        "ok": error_of(control.all_ok, None),
        "not ok": error_of(control.all_ok, "late" if control.rank == 1 else None),
        "after": control.broadcast(control.rank),
        "path": str(save(directory, "a", config=small, **options)),
        "again": error_of(save, directory, "a", **options),
        "broken": error_of(save, directory, "b", **{**options, "state": half_broken}),
    }


def work(rank, directory):
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    seen = speak_and_save(make_control(dist.group.WORLD), directory / "checkpoints")
    (directory / f"seen{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two ranks have worked."""
    directory = tmp_path_factory.mktemp("ranks")
    path = [str(Path(ds_core.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, str(directory)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in (0, 1)]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return directory


@pytest.mark.rung_c
def test_two_processes_hear_each_other(two_processes):
    first, second = (json.loads((two_processes / f"seen{rank}.json").read_text()) for rank in (0, 1))
    assert first["gathered"] == [[0, "", VALUE], [1, "x" * 100_000, VALUE]]
    assert second["gathered"] is None
    for seen in (first, second):
        assert seen["heard"] == VALUE
        assert seen["ok"] is None
        assert seen["not ok"] == "RankError: rank 1: late"
        assert seen["after"] == 0


@pytest.mark.rung_c
def test_two_processes_save_one_checkpoint_and_fail_together(two_processes):
    root = two_processes / "checkpoints"
    for rank in (0, 1):
        seen = json.loads((two_processes / f"seen{rank}.json").read_text())
        assert seen["path"] == str(root / "a")
        assert seen["again"].startswith(f"ValueError: {root / 'a'} exists")
        assert seen["broken"].startswith("RankError: rank 1: ValueError: safetensors files hold")
    assert sorted(path.name for path in root.iterdir()) == [".lock", "a", "latest"]
    assert verify(root / "a") == []
    assert open_checkpoint(root).world_size == 2
    assert open_checkpoint(root).run == {"rank": 0}
    assert torch.equal(load_full(root)["w"], torch.arange(NUMEL, dtype=torch.float32))


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[1]))
