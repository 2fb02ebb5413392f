"""Shared machinery of the tests: ranks, small models, parity."""

from .processes import Rank, RankError, RankPool

__all__ = ["Rank", "RankError", "RankPool"]
