"""Compressed and exact collectives, optimizers for slow links, and a shared-memory transport."""

from .backends import register_backends
from .codec import Codec

__all__ = ["Codec", "register_backends"]
