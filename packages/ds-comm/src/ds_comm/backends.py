"""Backends of ``torch.distributed`` that come with this wheel."""

from __future__ import annotations


def register_backends() -> None:
    """Make ``ds_shm`` known to ``torch.distributed``: collectives of one host's ranks, on CPU, through shared memory.

    Call it in every process, before ``init_process_group("ds_shm")`` or ``new_group(backend="ds_shm")``; again is
    nothing. ``import ds_comm.shm`` does the same.

    Example:
        >>> import torch.distributed as dist
        >>> register_backends()
        >>> dist.is_backend_available("ds_shm")
        True
    """
    # importing ds_comm must not import torch.distributed, nor register anything
    from .shm.registration import register

    register()
