"""The product for Hopper: compiled for sm_90a within its registers, and called with what it needs; it runs on GPUs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ds_kernels.backends.cutlass.backend import CutlassBackend
from ds_kernels.backends.cutlass.hopper import Hopper, Place, built_hopper
from torch.nn import functional

SOURCES = Path(__file__).parents[1] / "csrc" / "hopper"
MAX_REGISTERS = 168  # 384 threads: two groups of consumers and one of producers share 65,536


@pytest.mark.parametrize("layer", ["linear_gelu", "linear_dgelu"])
def test_the_product_compiles_for_sm_90a_and_spills_nothing(layer, tmp_path):
    nvcc, cutlass = shutil.which("nvcc"), importlib.util.find_spec("cutlass_library")
    if nvcc is None:
        pytest.skip("not run: there is no nvcc")
    if cutlass is None:
        pytest.skip("not run: there are no headers of CUTLASS; pip install nvidia-cutlass==4.2.0.0")
    if not SOURCES.is_dir():
        pytest.skip(f"not run: the sources are not beside the tests, in {SOURCES}")
    source = Path(cutlass.origin).parent / "source"
    command = [nvcc, "-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"]
    command += ["-DNDEBUG", "-Xptxas=-v", "-cubin", f"-I{source / 'include'}", f"-I{source / 'tools/util/include'}"]
    command += [str(SOURCES / f"{layer}_bfloat16.cu"), "-o", str(tmp_path / "product.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "wgmma.mma_async instructions are serialized" not in done.stderr
    entries = done.stderr.split("Compiling entry function '")[1:]
    products = [entry for entry in entries if "for 'sm_90a'" in entry and "GemmUniversal" in entry]
    assert len(products) == 1, done.stderr
    stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", products[0]).groups())
    assert (stack, stores, loads) == (0, 0, 0)
    assert int(re.search(r"Used (\d+) registers", products[0]).group(1)) <= MAX_REGISTERS


class Module:
    """Keeps what it is asked for, and computes it."""

    def __init__(self, size=0):
        self.size = size
        self.calls = []

    def workspace_bytes(self, op, dtype, sizes, multiprocessors):
        return self.size

    def run(self, op, dtype, pointers, sizes, multiprocessors, workspace, stream):
        assert len(pointers) == 5
        assert all(pointer % 16 == 0 for pointer in (*pointers, workspace))
        assert all(pointers) == (op == "linear_gelu")  # its gradient has no bias
        assert bool(workspace) == bool(self.size)
        self.calls.append((op, dtype, sizes, multiprocessors, stream))


class HopperOnCpu(Hopper):
    """Says that the CPU is one."""

    def serves(self, device):
        return device.type == "cpu"

    def place(self, device):
        return Place(device=-1, multiprocessors=132, stream=7)


class Launcher:
    """Refuses to run anything."""

    device_type = "cpu"

    def unusable(self):
        return None

    def __call__(self, kernel, device, blocks, args):
        raise AssertionError(f"{kernel.name} must not run where Hopper's kernel does")


def tensors(*shape, columns, dtype):
    return [torch.randn(*shape).to(dtype), torch.randn(columns, shape[-1]).to(dtype), torch.randn(columns).to(dtype)]


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 0), (torch.float16, 4096)])
def test_hopper_gets_rows_columns_inner_and_the_device(dtype, size):
    module = Module(size)
    backend = CutlassBackend(launcher=Launcher(), hopper=HopperOnCpu(module))
    fused = backend.find("linear_gelu", torch.device("cpu"), dtype)
    out, inside = fused(*tensors(2, 3, 64, columns=24, dtype=dtype))
    assert out.shape == inside.shape == (2, 3, 24)
    assert out.dtype == inside.dtype == dtype
    grad, weight, inside = (torch.randn(*shape).to(dtype) for shape in ((2, 3, 64), (64, 24), (2, 3, 24)))
    assert backend.find("linear_dgelu", torch.device("cpu"), dtype)(grad, weight, inside).shape == inside.shape
    sizes = (str(dtype)[6:], (6, 24, 64), 132, 7)
    assert module.calls == [("linear_gelu", *sizes), ("linear_dgelu", *sizes)]


def test_rows_off_16_byte_units_are_computed_plainly():
    module = Module()
    backend = CutlassBackend(launcher=Launcher(), hopper=HopperOnCpu(module))
    inputs = tensors(3, 12, columns=8, dtype=torch.bfloat16)
    got = backend.find("linear_gelu", torch.device("cpu"), torch.bfloat16)(*inputs)
    assert torch.equal(got[0], functional.gelu(functional.linear(*inputs)))
    assert module.calls == []


def test_without_such_a_gpu_it_serves_nothing():
    assert not Hopper(Module()).serves(torch.device("cpu"))


def test_the_built_module_names_what_it_does_not_take():
    hopper = built_hopper()
    if hopper is None:
        pytest.skip("not run: the module was not built; DS_KERNELS_BUILD_HOPPER=1, see the README")
    check, fine = hopper.module.check, (1024, 2048, 4096, 8192, 16384)
    for op in ("linear_gelu", "linear_dgelu"):
        check(op, "bfloat16", fine, (100, 64, 128))
        check(op, "float16", fine, (1, 8, 8))
        assert hopper.module.workspace_bytes(op, "bfloat16", (100, 64, 128), 132) >= 0
        for args, error, match in (
            (("float32", fine, (8, 8, 8)), ValueError, "dtype must be bfloat16 or float16; got float32"),
            (("bfloat16", (1024, 2, 0, 0, 0), (8, 8, 8)), ValueError, "16-byte boundaries; got one at address 2"),
            (("bfloat16", fine, (0, 8, 8)), ValueError, "sizes must be at least 1; got 0"),
            (("bfloat16", fine, (8, 8, 12)), RuntimeError, "refuses the product with rows, columns and .* 8, 8 and 12"),
            (("bfloat16", fine, (8, 9, 8)), RuntimeError, "refuses the product"),
        ):
            with pytest.raises(error, match=match):
                check(op, *args)
    with pytest.raises(ValueError, match="op must be linear_gelu or linear_dgelu; got linear"):
        check("linear", "bfloat16", fine, (8, 8, 8))
