"""How ``torch.distributed`` comes to know the backend, and how a group of it is made."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from .group import ShmProcessGroup
from .joining import join

_logger = logging.getLogger(__package__)

BACKEND = "ds_shm"
"""What ``init_process_group`` and ``new_group`` call it."""

_SLOT_BYTES = 512 << 10  # of a chunk: several fit into a second-level cache, and waiting costs little beside moving it
_SLOTS = 4  # one is put, one reduced, one taken, and one may lag
_SPINS = 2000  # some ten microseconds
_SPINS_CROWDED = 20  # whoever spins keeps the core from the rank it waits for


def register() -> None:
    """Make the backend ``ds_shm`` known to ``torch.distributed``; again is nothing.

    Example:
        >>> register()
        >>> dist.is_backend_available("ds_shm")
        True
    """
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make, extended_api=True, devices=["cpu"])


def _make(options: Any, backend_options: Any) -> dist.ProcessGroup | dist.ProcessGroupGloo:
    """Return a group; gloo's where ranks are on several hosts.

    Args:
        options: What ``torch.distributed`` knows of the group.
        backend_options: Of the caller; there are none.

    Raises:
        RuntimeError: The wheel was built without a compiler.
        ValueError: There were options.
    """
    if backend_options is not None:
        raise ValueError(f"{BACKEND} has no options; got {backend_options!r}")
    native = _native()
    rank, size, timeout = options.group_rank, options.group_size, options.timeout
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo/", options.store), rank, size, timeout=timeout)
    layout = (size, _SLOTS, _SLOT_BYTES)
    joined = join(PrefixStore("shm/", options.store), rank, size, timeout, native.segment_bytes(layout))
    if joined is None:
        if rank == 0:
            _logger.warning("%s: the ranks of this group are not on one host; it communicates over gloo", BACKEND)
        return gloo
    names = [f"rank {other}" for other in options.global_ranks_in_group or range(size)]
    spins = _SPINS if size <= len(os.sched_getaffinity(0)) else _SPINS_CROWDED
    try:
        channel = native.Channel(joined.segment, rank, layout, joined.watches, names, spins, timeout.total_seconds())
    finally:
        os.close(joined.segment)
    return ShmProcessGroup(options.store, rank, size, channel=channel, gloo=gloo, joined=joined)


def _native() -> ModuleType:
    try:
        return importlib.import_module("._shm", __package__.rpartition(".")[0])
    except ImportError as error:
        raise RuntimeError(
            f"the backend {BACKEND!r} needs the native module of ds-comm, which this installation lacks ({error}): "
            "install ds-comm where a C++ compiler is found on Linux, or use the backend 'gloo'"
        ) from error
