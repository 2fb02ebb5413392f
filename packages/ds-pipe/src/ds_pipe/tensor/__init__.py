"""Tensor parallelism: layers split over ranks, with bits that do not depend on their number."""

from .blocks import Blocks
from .layers import BlockDropout, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from .norm import grad_norm
from .plan import Plan, Rule, preset
from .splitting import Split, split
from .sums import Ranks

__all__ = [
    "BlockDropout",
    "Blocks",
    "ColumnParallelLinear",
    "Plan",
    "Ranks",
    "RowParallelLinear",
    "Rule",
    "Split",
    "VocabParallelEmbedding",
    "grad_norm",
    "preset",
    "split",
]
