"""What importing a wheel may do: nothing but import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

_CODE = """
import importlib, os, sys, threading
import torch

touched = []
def hook(event, args):
    if event == "open" and str(args[0]).endswith(("entry_points.txt", "METADATA")):
        touched.append(str(args[0]))
    if event in ("socket.connect", "subprocess.Popen", "os.fork", "os.putenv", "os.unsetenv"):
        touched.append(event)

before, threads, environment = set(sys.modules), len(os.listdir("/proc/self/task")), dict(os.environ)
sys.addaudithook(hook)
for name in sys.argv[1].split(","):
    importlib.import_module(name)
assert touched == [], touched
assert dict(os.environ) == environment
assert len(os.listdir("/proc/self/task")) == threads and threading.active_count() == 1
assert not torch.cuda.is_initialized()
print(*sorted(set(sys.modules) - before))
"""


def added_by_importing(names: Sequence[str]) -> list[str]:
    """Import modules beside torch in a process of their own; return the modules that came with them.

    Fails if importing touched a device, the environment, entry points, the network, or started a thread or a process,
    or printed or warned. Counts threads in /proc, so it runs on Linux.
    """
    command = [sys.executable, "-W", "error", "-c", _CODE, ",".join(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.split()
