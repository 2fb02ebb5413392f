"""Shared machinery of the tests: ranks, small models, exported state."""

from .processes import Rank, RankError, RankPool

__all__ = ["Rank", "RankError", "RankPool"]
