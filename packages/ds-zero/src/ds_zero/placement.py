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

A replicated gradient under sharded optimizer state is the rank's own gradient, kept until the step; otherwise what is
kept is the sum over all ranks, and always sharded over all of them.

[Note: Two axes]
Ranks are nodes x ranks of a node, ``rank = node * size_of_a_node + index``. A placement says what is sharded on each
of the two axes: ``REPLICATE`` on none, ``NODE`` within each node (every node holds everything), ``SHARD`` on both. With
one node, ``NODE`` and ``SHARD`` are the same.

===========================  ==========  =========  ===============  ===============================================
hybrid                       parameters  gradients  optimizer state  messages between nodes, elements per rank
===========================  ==========  =========  ===============  ===============================================
none                         shard       shard      shard            per micro-batch 3 P
``mics_shard_size``          node        shard      node             per micro-batch P / M, per step P / M
``zero_hpz_partition_size``  node        shard      shard            per micro-batch P / M, per step P / M
===========================  ==========  =========  ===============  ===============================================

(stage 3, nodes of M ranks, P parameters, many nodes.) The last is the cheapest: memory of optimizer state as without
nodes, gathers as within one. In hierarchical partitioning as published, forward passes gather over all nodes and a
secondary shard serves the backward pass; here the secondary shard is brought up to date once, after the step, and
serves both.

References:
    Zhang et al., "MiCS: Near-linear Scaling for Training Gigantic Model on Public Cloud", VLDB 2022.
    Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", 2023.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Placement(Enum):
    """What a rank holds of a flat buffer; see [Note: Two axes]."""

    REPLICATE = "replicate"  # all of it
    NODE = "node"  # one of as many equal intervals as a node has ranks
    SHARD = "shard"  # one of as many equal intervals as there are ranks; it lies in the rank's NODE interval


class Placements(NamedTuple):
    """See [Note: Placement triple]."""

    param: Placement
    grad: Placement
    state: Placement


_R, _N, _S = Placement.REPLICATE, Placement.NODE, Placement.SHARD
_STAGES = (Placements(_R, _R, _R), Placements(_R, _R, _S), Placements(_R, _S, _S), Placements(_S, _S, _S))
_MICS = (_STAGES[0], Placements(_R, _R, _N), Placements(_R, _S, _N), Placements(_N, _S, _N))
_HPZ = Placements(_N, _S, _S)


def placements_of(stage: int, num_ranks: int, *, mics: bool = False, hpz: bool = False) -> Placements:
    """Return the triple of ``stage`` on ``num_ranks`` ranks.

    On a single rank a shard is the whole, so every stage is kept the way that copies least.

    Args:
        stage: 0 to 3.
        num_ranks: Ranks in all.
        mics: Whether nodes repeat each other.
        hpz: Whether parameters alone are repeated in each node; stage 3 only.

    Example:
        >>> placements_of(2, 4).param.value, placements_of(2, 4).grad.value
        ('replicate', 'shard')
        >>> placements_of(3, 4, hpz=True).param.value
        'node'
    """
    if num_ranks == 1:
        return _STAGES[1]
    if hpz:
        return _HPZ
    return (_MICS if mics else _STAGES)[stage]
