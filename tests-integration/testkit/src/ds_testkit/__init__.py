"""Shared machinery of the tests: ranks, small models, parity."""

from .processes import Rank, RankPool, RankError

__all__ = ["Rank", "RankError", "RankPool"]
