"""All GPU kernels compile for each GPU, within stated registers and shared memory, and spill nothing."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
import torch
from ds_kernels.backends.cutlass.linear import linear_dgelu_kernel, linear_gelu_kernel
from ds_kernels.backends.nvrtc.catalog import all_kernels
from ds_kernels.backends.nvrtc.compiler import compile_cubin
from ds_kernels.backends.nvrtc.kernel import HEADERS

ARCHES = ("sm_80", "sm_90", "sm_100")


class Bound(NamedTuple):
    """What a kernel may use, so that a multiprocessor (65,536 registers) holds enough threads to hide memory."""

    registers: int
    shared: int = 0


# By header. 40 registers leave room for 1,536 threads of a multiprocessor, 48 for 1,280, 64 for 1,024.
BOUNDS = {
    "step.cuh": Bound(56, shared=128),
    "tree_sum.cuh": Bound(64),
    "chunk_sumsq.cuh": Bound(40, shared=8 * 1024),
    "bias_gelu.cuh": Bound(64, shared=4 * 1024),
    "bias_swiglu.cuh": Bound(64, shared=4 * 1024),
    "norm.cuh": Bound(96, shared=8 * 1024),  # rows are kept in registers
    "block_codec.cuh": Bound(64, shared=36 * 1024),
    "bias_dropout.cuh": Bound(64, shared=4 * 1024),
    "softmax.cuh": Bound(104, shared=1024),  # rows are kept in registers; two blocks of 256 threads fit, as with 96
}


def covering(kernels, together):
    """A few for all: of each function, any ``together`` of its template arguments occur as they do in all."""
    kinds = {}
    for kernel in kernels:
        name, *arguments = re.sub(r"(\w)<(\w+)>", r"\1\2", kernel.function[:-1]).replace("<", ", ").split(", ")
        kinds[kernel] = {(name, *kind) for kind in itertools.combinations(enumerate(arguments), together)}
        kinds[kernel] |= {(name, *arguments)} if len(arguments) < together else set()
    chosen, left = [], set().union(*kinds.values())
    while left:
        chosen.append(max(kernels, key=lambda kernel: len(kinds[kernel] & left)))
        left -= kinds[chosen[-1]]
    return chosen


def test_every_family_has_bounds():
    assert {kernel.header for kernel in all_kernels()} == set(BOUNDS)


@pytest.mark.parametrize(("arch", "together"), [("sm_80", 1), ("sm_90", 2), ("sm_100", 1)])
def test_nvcc_compiles_kernels_within_their_bounds(tmp_path, arch, together):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc to compile the GPU kernels with")
    kernels = covering(all_kernels(), together)
    includes = [f'#include "{header}"' for header in sorted({kernel.header for kernel in kernels})]
    entries = [kernel.source.splitlines()[-1] for kernel in kernels]
    source = tmp_path / "kernels.cu"
    source.write_text("\n".join([*includes, kernels[0].source.splitlines()[-2], *entries, ""]))
    command = [nvcc, "-std=c++17", "-fmad=false", "--cubin", "-Xptxas=-v", "-Werror=all-warnings", f"-arch={arch}"]
    command += [f"-I{HEADERS}", str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    used = _usage(done.stderr)
    assert set(used) == {(kernel.name, arch) for kernel in kernels}
    over = []
    for kernel in kernels:
        bound = BOUNDS[kernel.header]
        registers, spilled, shared = used[kernel.name, arch]
        if registers > bound.registers or spilled or shared > bound.shared:
            over.append(f"{kernel.name} for {arch}: {registers} registers, {spilled} B spilled, {shared} B shared")
    assert not over, "\n".join(over)


def _usage(text):
    """Registers, spilled bytes and shared memory by kernel and architecture, from what ptxas says."""
    used = {}
    for part in text.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\w+)' for '(\w+)'", part).groups()
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        used[name, arch] = registers, sum(map(int, stack.groups())), int(shared.group(1)) if shared else 0
    return used


def _compiled(kernel, arch):
    try:
        return compile_cubin(kernel, arch)
    except RuntimeError as error:
        if "libcuda" in str(error):  # releases of cuda.core before 1.0 ask for the driver's
            pytest.skip(f"this cuda.core needs a driver to compile: {error}")
        raise


@pytest.mark.parametrize("arch", ARCHES)
def test_nvrtc_compiles_one_kernel_of_each_family(arch):
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        pytest.skip("cuda.core is not installed: pip install 'ds-kernels[cuda]'")
    for kernel in {kernel.header: kernel for kernel in all_kernels()}.values():
        cubin = _compiled(kernel, arch)
        assert cubin.startswith(b"\x7fELF")
        assert kernel.name.encode() in cubin


@pytest.mark.parametrize("kernel_of", [linear_gelu_kernel, linear_dgelu_kernel])
@pytest.mark.parametrize("arch", ARCHES[:2])
def test_nvrtc_compiles_the_product_from_cutlass(arch, kernel_of):
    for name in ("cuda", "cuda.core", "cutlass_library"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'ds-kernels[cutlass]'")
    kernel = kernel_of(torch.bfloat16)
    assert kernel.name.encode() in _compiled(kernel, arch)
