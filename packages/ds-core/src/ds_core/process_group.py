"""The process group a run works in."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ._env import read_launch


def join_group() -> dist.ProcessGroup | None:
    """Return the group of all ranks, starting it if this process was launched as one of several.

    Returns:
        The default group; None for a single process that was not launched with others.

    Raises:
        ValueError: The environment holds a part of a launch only.
    """
    if dist.is_initialized():
        return dist.group.WORLD
    launch = read_launch()
    if launch is None or launch.world_size == 1:
        return None
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.group.WORLD


def local_device() -> torch.device:
    """Return the device of this process: its GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    launch = read_launch()
    return torch.device("cuda", 0 if launch is None else launch.local_rank)
