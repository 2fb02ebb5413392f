"""A process that saves checkpoint after checkpoint is killed at random moments; the last one always loads.

The process to kill is forked from a server that has torch loaded already, so that a kill costs milliseconds.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ds_core
import pytest
import torch
from ds_core._control import SingleControl
from ds_core.checkpoint import (
    CheckpointError,
    SaveConfig,
    default_tag,
    load_full,
    open_checkpoint,
    published_tags,
    save,
    verify,
)

NUM_KILLS = 30
NUM_ELEMENTS = 10_000
CONFIG = SaveConfig(part_bytes=16_384, piece_bytes=4_096)


def state_of(step: int) -> SimpleNamespace:
    shape = torch.Size([NUM_ELEMENTS])
    pieces = [
        SimpleNamespace(name="w", role=role, shape=shape, start=0, data=torch.full(shape, float(step)))
        for role in ("param", "exp_avg")
    ]
    return SimpleNamespace(pieces=pieces, shapes={"w": shape}, scalars={"step": step})


def last_step(directory: Path) -> int:
    return open_checkpoint(directory).run["step"] if published_tags(directory) else 0


def save_for_ever(directory: Path) -> None:
    """What is killed: resume, then save and acknowledge step after step."""
    step = last_step(directory)
    while True:
        step += 1
        control = SingleControl()
        save(
            directory,
            default_tag(step),
            state=state_of(step),
            run={"step": step},
            control=control,
            config=CONFIG,
        )
        os.write(1, f"saved {step}\n".encode())


def serve() -> None:
    """Fork one saving process per line of input."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(Path(line.strip()))
            finally:
                os._exit(1)
        os.write(1, f"pid {pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"ended\n")


@pytest.fixture
def server():
    path = [str(Path(ds_core.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process
        process.stdin.close()


def kill_after(server: subprocess.Popen, directory: Path, delay: float) -> int:
    """Start a saving process, kill it ``delay`` seconds later, return the last step it acknowledged."""
    server.stdin.write(f"{directory}\n".encode())
    server.stdin.flush()
    output = server.stdout.fileno()
    seen = b""
    while b"pid" not in seen or not seen.endswith(b"\n"):
        seen += os.read(output, 4096)
    pid = int(seen.split(b"pid ")[1].split()[0])
    end = time.monotonic() + delay
    while (left := end - time.monotonic()) > 0 and select.select([output], [], [], left)[0]:
        seen += os.read(output, 4096)
    os.kill(pid, signal.SIGKILL)
    while not seen.endswith(b"ended\n"):
        seen += os.read(output, 4096)
    return max([int(word) for word in seen.split() if word.isdigit() and int(word) != pid], default=0)


@pytest.mark.rung_c
def test_killed_at_random_moments_the_last_checkpoint_loads(server, tmp_path):
    rng = random.Random(0)
    begin = time.monotonic()
    save(tmp_path / "timed", "a", state=state_of(0), run={}, control=SingleControl(), config=CONFIG)
    save_seconds = time.monotonic() - begin
    directory = tmp_path / "killed"
    last = num_stopped_inside = 0
    for _ in range(NUM_KILLS):
        acknowledged = kill_after(server, directory, rng.uniform(0.0, 5 * save_seconds))
        num_stopped_inside += any(directory.glob(".tmp-*"))
        if not published_tags(directory):
            assert acknowledged == 0
            with pytest.raises(CheckpointError):
                open_checkpoint(directory)
            continue
        checkpoint = open_checkpoint(directory)
        step = checkpoint.run["step"]
        # What was acknowledged is there; at most one more was published before the kill.
        assert max(last, acknowledged) <= step <= max(last, acknowledged) + 1
        assert checkpoint.tag == default_tag(step)
        assert verify(checkpoint.path) == []
        for role in ("param", "exp_avg"):
            expected = torch.full((NUM_ELEMENTS,), float(step))
            assert torch.equal(load_full(checkpoint.path, role)["w"], expected)
        last = step
    assert last > 0, "no save was quick enough to end before its kill"
    assert num_stopped_inside > 0, "no kill hit a save"
    save(directory, "end", state=state_of(0), run={"step": 0}, control=SingleControl())
    assert not any(directory.glob(".tmp-*"))


if __name__ == "__main__":
    serve()
