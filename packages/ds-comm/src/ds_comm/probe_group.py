"""The function that measures the links of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from .links import Links


def probe(
    group: dist.ProcessGroup | None = None,
    *,
    node_size: int | None = None,
    device: torch.device | None = None,
    limit: float = 0.1,
    rounds: int = 5,
) -> Links:
    """Measure latency and bandwidth between the ranks of ``group``, within nodes and across them.

    All ranks call it, and get the same numbers. Messages grow until one takes ``limit`` seconds, so it takes a few
    seconds; memory: two buffers of at most 64 MiB. Between nodes, the ranks with the same place in their nodes
    communicate, all such groups at once.

    Args:
        group: The ranks, of any backend; None: all ranks.
        node_size: Ranks of a node, side by side; None: those on hosts of one name.
        device: Where messages lie; None: the current GPU for NCCL, else the CPU.
        limit: Seconds of a message after which none is larger.
        rounds: Messages of each size; their median counts.

    Raises:
        ValueError: The ranks are not a whole number of nodes, or hosts have different numbers of ranks.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> probe()  # alone: no links
        Links(axes=())
        >>> dist.destroy_process_group()
    """
    # importing ds_comm must not import torch.distributed
    from .probing import measure_axes

    return measure_axes(group, node_size=node_size, device=device, limit=limit, rounds=rounds)
