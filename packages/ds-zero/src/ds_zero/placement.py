"""Where each kind of state lives: a ZeRO stage as a triple of placements.

[Note: Placement triple]
Every rank computes with whole parameters and produces a whole gradient, one unit at a time; the triple says only
what is *kept* between those moments.

================  ===========  ===========  ===============
stage             parameters   gradients    optimizer state
================  ===========  ===========  ===============
0                 replicate    replicate    replicate
1                 replicate    replicate    shard
2                 replicate    shard        shard
3                 shard        shard        shard
================  ===========  ===========  ===============

A replicated gradient under sharded optimizer state is the rank's own gradient, kept until the step; under
replicated state it is the sum over all ranks.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Placement(Enum):
    """How a flat buffer stands over the ranks of a mesh axis."""

    REPLICATE = "replicate"  # each rank holds all of it
    SHARD = "shard"  # rank r of N holds the r-th of N equal intervals


class Placements(NamedTuple):
    """See [Note: Placement triple]."""

    param: Placement
    grad: Placement
    state: Placement


_R, _S = Placement.REPLICATE, Placement.SHARD
_STAGES = (Placements(_R, _R, _R), Placements(_R, _R, _S), Placements(_R, _S, _S), Placements(_S, _S, _S))


def placements_of(stage: int, num_ranks: int) -> Placements:
    """Return the triple of ``stage`` on ``num_ranks`` ranks.

    On a single rank a shard is the whole, so every stage is kept the way that copies least.

    Example:
        >>> placements_of(2, 4).param.value, placements_of(2, 4).grad.value
        ('replicate', 'shard')
    """
    return _STAGES[1] if num_ranks == 1 else _STAGES[stage]
