"""Compressed and exact collectives, optimizers for slow links, and a shared-memory transport."""

from .codec import Codec

__all__ = ["Codec"]
