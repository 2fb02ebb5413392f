"""What the first use of a GPU kernel costs before the driver is asked: compiled by NVRTC, or read from the disk.

Needs cuda.core and NVRTC, no GPU: ``python benchmarks/nvrtc_first_use.py --arch sm_90``. Each figure is of a process of
its own, a median of several; importing torch is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

ONE = """
import json, sys, time
from pathlib import Path
import torch
from ds_kernels.backends.nvrtc.cache import KernelCache
from ds_kernels.backends.nvrtc.catalog import all_kernels
kernel = next(k for k in all_kernels() if k.name == sys.argv[1])
start = time.perf_counter()
from ds_kernels.backends.nvrtc.compiler import cache_key, compile_cubin
cubin = KernelCache(Path(sys.argv[3])).get(cache_key(kernel, sys.argv[2]), lambda: compile_cubin(kernel, sys.argv[2]))
print(json.dumps([time.perf_counter() - start, len(cubin)]))
"""


def measure(name: str, arch: str, folder: str) -> tuple[float, int]:
    """Return the milliseconds of the first use of one kernel in a new process, and the bytes of its machine code."""
    command = [sys.executable, "-c", ONE, name, arch, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a process of its own ended with {done.returncode}:\n{done.stderr}")
    seconds, size = json.loads(done.stdout)
    return seconds * 1e3, size


NAMES = (
    "step_AdamW_Float32_Float32_None_Float32_Float32",
    "step_LambMoments_Split_BFloat16_None_Signed_Roots",
    "block_encode_Ternary_BFloat16_Float16_1024",
    "norm_backward_BFloat16_true_256",
)
"""A plain kernel and those of the most code."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    print("| kernel | compiled, ms | from the disk, ms | bytes |\n| --- | --- | --- | --- |")
    for name in NAMES:
        cold, cached, size = [], [], 0
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                cold.append(measure(name, options.arch, folder)[0])
                milliseconds, size = measure(name, options.arch, folder)
                cached.append(milliseconds)
        print(f"| `{name}` | {statistics.median(cold):.0f} | {statistics.median(cached):.1f} | {size} |", flush=True)


if __name__ == "__main__":
    main()
