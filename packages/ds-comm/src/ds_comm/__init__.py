"""Compressed and exact collectives, optimizers for slow links, and a shared-memory transport."""

from .backends import register_backends
from .codec import Codec
from .compressed import CompressedCollectives

__all__ = ["Codec", "CompressedCollectives", "register_backends"]
