"""A throw-away distribution of somebody else's: its kernel backend and its optimizer are used by the whole stack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_MODULE = '''
import torch
from ds_kernels import ReferenceBackend


class Counting:
    """The reference backend, counting its calls."""

    name = "counting"

    def __init__(self):
        self.inner = ReferenceBackend()
        self.calls = {"adamw": 0, "tree_sum": 0, "chunk_sumsq": 0}

    def unusable(self):
        return None

    def find(self, op, device, dtype):
        kernel = self.inner.find(op, device, dtype)

        def counted(*args, **kwargs):
            self.calls[op] += 1
            return kernel(*args, **kwargs)

        return counted


class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(param.grad.sign(), alpha=-group["lr"])


class Maker:
    update = None

    def make(self, groups):
        return SignDescent(groups, lr=0.5)


class Plugin:
    role_version = ROLE_VERSION
    config_type = None

    def __init__(self, thing):
        self.thing = thing

    def build(self, config, context):
        return self.thing


backend = Counting()
counting, sign = Plugin(backend), Plugin(Maker())
'''

_PROGRAM = """
import ds_core, torch

model = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.zeros_(model.weight)
config = {"train_batch_size": 2, "kernels": {"backend": "counting"}, "optimizer": {"type": OPTIMIZER}}
engine, *_ = ds_core.initialize(model, config=config)
for _ in range(3):
    engine.backward(engine(torch.tensor([[1.0, -1.0]])).sum())
    engine.step()
import acme_parts
print(acme_parts.backend.calls, model.weight.tolist())
"""


def run(folder: Path, optimizer: str, role_version: int = 1) -> subprocess.CompletedProcess[str]:
    """Install the distribution into ``folder`` and run the program with it in sight."""
    (folder / "acme_parts.py").write_text(_MODULE.replace("ROLE_VERSION", str(role_version)))
    info = folder / "acme_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n")
    points = "[ds.kernels]\ncounting = acme_parts:counting\n[ds.optimizer]\nSignDescent = acme_parts:sign\n"
    (info / "entry_points.txt").write_text(points)
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + _PROGRAM.replace("OPTIMIZER", repr(optimizer))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_kernel_backend_of_another_wheel(tmp_path: Path, optimizer: str) -> None:
    done = run(tmp_path, optimizer)
    assert done.returncode == 0, done.stderr
    adamw = 3 if optimizer == "AdamW" else 0
    assert f"{{'adamw': {adamw}, 'tree_sum': 0, 'chunk_sumsq': 3}}" in done.stdout, "one rank has nothing to sum"


def test_optimizer_of_another_wheel(tmp_path: Path) -> None:
    done = run(tmp_path, "SignDescent")
    assert done.returncode == 0, done.stderr
    assert "[[-1.5, 1.5]]" in done.stdout


def test_plugin_for_another_version_of_its_role(tmp_path: Path) -> None:
    done = run(tmp_path, "SGD", role_version=2)
    assert done.returncode == 1
    assert "acme-parts 1.0 speaks version 2 of its role, this ds-core speaks version 1" in done.stderr


def test_plugin_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path, "SignDecent")
    assert done.returncode == 1
    assert "optimizer.type = 'SignDecent'" in done.stderr
    assert "did you mean 'SignDescent'?" in done.stderr
