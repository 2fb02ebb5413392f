"""The Triton kernels, run by Triton's interpreter on the CPU, in a process of their own: it is chosen at import.

float32 and float16 only: the interpreter computes nonsense in bfloat16 (seen in 3.6 to 3.9).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import ds_kernels
import pytest
import torch
from ds_kernels.backends.triton.backend import TritonBackend

PROGRAM = """
import torch
import ds_kernels
from ds_kernels import ReferenceBackend
from ds_kernels.backends.triton.backend import TritonBackend

torch.manual_seed(0)
ours, plain, cpu = TritonBackend(device_type="cpu"), ReferenceBackend(), torch.device("cpu")
assert ours.unusable() is None

def listed(result):
    return list(result) if isinstance(result, tuple) else [result]

for dtype in (torch.float32, torch.float16):
    for approximate in ("none", "tanh"):
        for shape in ((37, 131), (2, 3, 260), (0, 4), (1, 1)):
            for with_bias in (True, False):
                x, grad = torch.randn(2, *shape).to(dtype)
                if x.numel():
                    x.view(-1)[0] = 40.0  # where the exponential of a careless tanh overflows
                bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
                exact = [None if t is None else t.double() for t in (grad, x, bias)]
                for op, first in (("bias_gelu", 1), ("bias_gelu_backward", 0)):
                    kernel, right = ours.find(op, cpu, dtype), plain.find(op, cpu, dtype)
                    got = listed(kernel(*(grad, x, bias)[first:], approximate))
                    theirs = listed(right(*(grad, x, bias)[first:], approximate))
                    want = listed(right(*exact[first:], approximate))
                    for a, b, c in zip(got, theirs, want):
                        assert a.dtype == b.dtype and a.shape == b.shape
                        if a.numel():
                            room = torch.finfo(dtype).eps * c.abs().max()
                            errors = [(t.double() - c).abs().max() for t in (a, b)]
                            assert errors[0] <= 2 * errors[1] + room, (op, dtype, approximate, shape, errors)
print("agreed")
"""


def test_the_kernels_are_as_exact_as_torch_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    root = Path(ds_kernels.__file__).parents[ds_kernels.__name__.count(".") + 1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "ignore:overflow", "-c", PROGRAM],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agreed\n"


def test_only_tensors_on_its_devices_are_served():
    backend = TritonBackend()
    assert backend.find("bias_gelu", torch.device("cpu"), torch.float32) is None
    assert backend.find("bias_gelu", torch.device("cuda"), torch.int32) is None
    assert backend.find("adamw", torch.device("cuda"), torch.float32) is None


def test_without_a_gpu_the_reason_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert TritonBackend().unusable() in ("Triton is missing; pip install triton", "torch finds no GPU")
