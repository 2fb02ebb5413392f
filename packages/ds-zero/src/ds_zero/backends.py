"""Which backends of ``torch.distributed`` send what lies on CPU as messages with tags."""

from __future__ import annotations

import torch.distributed as dist

# of ds_comm's shared-memory backend, messages between two ranks go over gloo
_TAGGED = frozenset({"gloo", "mpi", "ds_shm"})


def sends_tagged(group: dist.ProcessGroup | None) -> bool:
    """Return whether messages of ``group`` lie on CPU, are matched by tags, and block the thread that waits."""
    return dist.get_backend(group) in _TAGGED
