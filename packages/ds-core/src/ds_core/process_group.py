"""The process group a run works in."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

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


def local_device(group: dist.ProcessGroup | None, model: nn.Module) -> torch.device:
    """Return the device that this process trains on.

    Args:
        group: The ranks. One that communicates over nccl, or none at all, means this process's GPU where there is one.
        model: Without nccl it stays where it is: on its GPU, or on the CPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own = next((param.device for param in model.parameters() if param.is_cuda), None)
    if group is not None and "cuda:nccl" not in dist.get_backend_config(group):
        return own or torch.device("cpu")
    launch = read_launch()
    if launch is not None:
        return torch.device("cuda", launch.local_rank)
    return own or torch.device("cuda", torch.cuda.current_device())


def message_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Return where messages between ranks live: on the CPU where ``group`` takes its tensors, else ``device``."""
    takes_cpu = group is None or "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if takes_cpu else device
