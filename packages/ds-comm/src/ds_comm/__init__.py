"""Compressed and exact collectives, optimizers for slow links, and a shared-memory transport."""

from .backends import register_backends
from .codec import Codec
from .compressed import CompressedCollectives
from .links import LinkCost, Links
from .probe_group import probe

__all__ = ["Codec", "CompressedCollectives", "LinkCost", "Links", "probe", "register_backends"]
