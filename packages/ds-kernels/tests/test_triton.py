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
from itertools import product

import torch
import ds_kernels
from ds_kernels import ReferenceBackend
from ds_kernels.backends.triton.backend import TritonBackend

torch.manual_seed(0)
ours, plain, cpu = TritonBackend(device_type="cpu"), ReferenceBackend(), torch.device("cpu")
assert ours.unusable() is None

def listed(result):
    return list(result) if isinstance(result, tuple) else [result]

def widened(tensor):
    return None if tensor is None else tensor.double()

def compare(got, theirs, want, *case):
    for a, b, c in zip(listed(got), listed(theirs), listed(want)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.numel():
            room = torch.finfo(a.dtype).eps * c.abs().max()
            errors = [(t.double() - c).abs().max() for t in (a, b)]
            assert errors[0] <= 2 * errors[1] + room, (*case, errors)

SHAPES = ((37, 131), (2, 3, 260), (0, 4), (1, 1))
for dtype, shape, with_bias, op in product(
    (torch.float32, torch.float16), SHAPES, (True, False), ("none", "tanh", "bias_swiglu")
):
    op, more, wide = (op, (), 2) if op == "bias_swiglu" else ("bias_gelu", (op,), 1)
    x, grad = torch.randn(*shape[:-1], wide * shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    if x.numel():
        x.view(-1)[0] = 40.0  # where the exponential of a careless tanh overflows
    bias = torch.randn(x.shape[-1]).to(dtype) if with_bias else None
    for name, inputs in ((op, (x, bias)), (f"{op}_backward", (grad, x, bias))):
        kernel, right = ours.find(name, cpu, dtype), plain.find(name, cpu, dtype)
        want = right(*map(widened, inputs), *more)
        compare(kernel(*inputs, *more), right(*inputs, *more), want, name, dtype, more, shape)

def exact_norm(total, weight, bias, layer):
    centered = total - total.mean(-1, keepdim=True) if layer else total
    out = centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias

# A row longer than a block; rows that fill more than one slab of the weight's gradient.
for dtype, op, shape, affine, added in product(
    (torch.float32, torch.float16), ("layer_norm", "rms_norm"), ((2, 2500), (2, 3, 131), (0, 8), (140, 24)),
    (True, False), (True, False),
):
    x, residual, grad, grad_sum = torch.randn(4, *shape).to(dtype)
    x = x + 2  # a mean that is not small
    residual, grad_sum = (residual, grad_sum) if added else (None, None)
    layer = op == "layer_norm"
    weight, bias = torch.randn(2, shape[-1]).to(dtype) if affine else (None, None)
    case = op, dtype, shape, affine, added
    forward = (x, residual, weight, *([bias] if layer else []), 1e-5)
    got, theirs = (backend.find(op, cpu, dtype)(*forward) for backend in (ours, plain))
    total = x + residual if added else x
    assert torch.equal(got[1], theirs[1])
    vectors = [widened(t) for t in (weight, bias if layer else None)]
    leaves = [t.requires_grad_() for t in (total.double(), *vectors) if t is not None]
    exact = exact_norm(leaves[0], *[*leaves[1:], None, None][:2], layer)
    compare(got[0], theirs[0], exact.detach(), *case)
    right = list(torch.autograd.grad(exact, leaves, grad.double()))
    right[0] = right[0] + grad_sum.double() if added else right[0]
    backward = (grad, grad_sum, total, weight, *theirs[2:])
    results = [backend.find(f"{op}_backward", cpu, dtype)(*backward) for backend in (ours, plain)]
    compare(*results, (*right, *[x.new_empty(0)] * 2)[: len(results[0])], "backward", *case)
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
    assert backend.find("layer_norm_backward", torch.device("cpu"), torch.float32) is None
    assert backend.find("adamw", torch.device("cuda"), torch.float32) is None


def test_without_a_gpu_the_reason_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert TritonBackend().unusable() in ("Triton is missing; pip install triton", "torch finds no GPU")
