"""The programs that the documentation shows run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DS_RUN = [sys.executable, "-c", "from ds_core.cli import main; main(prog_name='ds')", "run"]

# What stands before the first program of a page that goes on from a training.
TRAINED = """
import ds_core
import torch

engine, *_ = ds_core.initialize(
    torch.nn.Linear(2, 1),
    config={"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}},
)
for _ in range(120):
    engine.backward(engine(torch.ones(1, 2)).mean())
    engine.step()
"""

OWN_OPTIMIZER = """
import ds_zero

model = torch.nn.Linear(2, 1, bias=False)
before = model.weight.detach().clone()
sharded = ds_zero.shard(model, lambda groups: SignDescent(groups, lr=0.5))
assert [param.dim() for param in sharded.optimizer.param_groups[0]["params"]] == [1]
model(torch.ones(1, 2)).sum().backward()
sharded.step()
assert torch.equal(model.weight, before - 0.5)
"""


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def execute(command: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a small program: on one thread, so that it does not fight with its like for the cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run(folder: Path, source: str, command: list[str]) -> None:
    """Run a program in a folder of its own."""
    (folder / "script.py").write_text(source, encoding="utf-8")
    result = execute([*command, "script.py"], folder)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize(
    ("page", "count", "before", "check"),
    [
        ("README.md", 1, "", "assert engine.global_steps == 8"),
        ("packages/ds-core/README.md", 2, "", "assert weights.keys() == moments.keys() == {'weight', 'bias'}"),
        ("packages/ds-zero/README.md", 2, "", "assert norm > 0"),
        (
            "packages/ds-pipe/README.md",
            6,
            "",
            "assert len(losses) == 4 and bounds == [0, 4, 9] and schedule.num_stages == 8",
        ),
        ("docs/optimizers.md", 1, "", OWN_OPTIMIZER),
        ("docs/scale.md", 1, "", "assert sent['all_gather'] == 14 * sent['reduce_scatter'] // 8"),
        ("docs/slow-links.md", 1, "", "assert loss < 0.5 and sent == 0 and state['param_groups'][0]['step'] == 80"),
        ("docs/pipelines.md", 1, "", "assert engine.global_steps == 2 and loss < 6"),
        (
            "docs/tensor-parallelism.md",
            2,
            "",
            "assert engine.global_steps == 2 and len(made.parts('2.weight')) == 4",
        ),
        ("docs/models.md", 2, "", "assert engine.global_steps == 1 and run.saved.now == 512"),
        ("docs/large-models.md", 4, "", "assert access.full_param('3.weight')[0].abs().max() == 0"),
        ("docs/checkpoints.md", 2, TRAINED, "assert client_state == {'epoch': 3} and problems == []"),
    ],
)
def test_the_programs_of_a_page_run_one_after_the_other(
    tmp_path: Path, page: str, count: int, before: str, check: str
) -> None:
    found = programs(page)
    assert len(found) == count
    run(tmp_path, "\n".join([before, *found, check]), [sys.executable, "-W", "error"])


def test_the_first_program_runs_on_two_processes(tmp_path: Path) -> None:
    (source,) = programs("README.md")
    run(tmp_path, source, [*DS_RUN, "--nproc", "2"])
    written = {path.name[:11] for path in (tmp_path / "checkpoints" / "global_step8").glob("*.safetensors")}
    assert written == {"shard-00000", "shard-00001"}


def test_the_program_for_slow_links_runs_on_two_processes(tmp_path: Path) -> None:
    (source,) = programs("docs/slow-links.md")
    checks = "assert loss < 0.5 and sent > 0\ndist.destroy_process_group()\n"
    run(tmp_path, source + checks, [*DS_RUN, "--nproc", "2"])


def test_the_program_for_pipelines_runs_on_two_processes(tmp_path: Path) -> None:
    (source,) = programs("docs/pipelines.md")
    checks = "assert engine.global_steps == 2 and len(list(engine.module.parameters())) < 75\n"
    run(tmp_path, source + checks, [*DS_RUN, "--nproc", "2"])


def test_the_program_for_tensor_parallelism_runs_on_two_processes(tmp_path: Path) -> None:
    source, _ = programs("docs/tensor-parallelism.md")
    checks = "assert engine.global_steps == 2 and len(list(engine.module.parameters())) == 7\n"
    run(tmp_path, source.replace('"autotp_size": 1', '"autotp_size": 2') + checks, [*DS_RUN, "--nproc", "2"])


def test_the_example_trains_resumes_and_holds_its_limit(tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_lm.py"
    config = json.loads((example.parent / "ds_config.json").read_text())
    (steps,) = re.findall(r"^STEPS = (\d+)", example.read_text(), re.MULTILINE)
    assert config["scheduler"]["params"]["total_num_steps"] == int(steps)
    text = tmp_path / "text"
    text.mkdir()
    for index in range(12):  # the 11th is held out
        (text / f"{index:02d}.txt").write_text("to be or not to be\n" * 200)
    options = f"{example} --data {text} --out {tmp_path / 'out'} --steps 4 --dim 64 --layers 1".split()
    first = execute([sys.executable, *options, "--stop-at", "half"])
    assert first.returncode == 0, first.stderr
    assert "step     2  held out" in first.stdout
    assert all(len(line) < 80 for line in first.stdout.splitlines() if str(tmp_path) not in line)
    second = execute([sys.executable, *options, "--resume", "--max-loss", "1.5"])
    assert second.returncode == 1, second.stderr
    assert "resumed at step 2" in second.stdout
    assert "after 4 steps" in second.stdout
    assert "FAILED: the held-out loss was to be at most 1.5 nats/byte" in second.stdout
