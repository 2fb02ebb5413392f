"""ZeRO 0, 1, 2, 3 through one mechanism: partitioned parameters, gradients and optimizer state."""

from .api import Parts, shard
from .config import Precision, ZeroConfig
from .deferred import deferred
from .gradient import GradNorm
from .sharded import MemoryReport, Sharded
from .state import PartState, Piece
from .weights import load_safetensors, save_safetensors

__all__ = [
    "GradNorm",
    "MemoryReport",
    "PartState",
    "Parts",
    "Piece",
    "Precision",
    "Sharded",
    "ZeroConfig",
    "deferred",
    "load_safetensors",
    "save_safetensors",
    "shard",
]
