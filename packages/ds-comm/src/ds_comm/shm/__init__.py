"""The backend ``ds_shm`` of ``torch.distributed``: collectives of one host's ranks through shared memory.

Importing this module registers it, in every process that does so before it makes a group.

Example:
    >>> import torch.distributed as dist
    >>> dist.is_backend_available("ds_shm")
    True
"""

from .group import ShmProcessGroup
from .registration import BACKEND, register

register()

__all__ = ["BACKEND", "ShmProcessGroup", "register"]
