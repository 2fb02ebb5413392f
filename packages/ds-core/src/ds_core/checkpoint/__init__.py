"""Checkpoints without pickle, written by any number of ranks and read by any other, every byte verified.

A checkpoint is a folder of safetensors files and a manifest that says which interval of which tensor stands
where, under which hash. Reading on another number of ranks is intersecting intervals; nothing is converted.
"""

from __future__ import annotations

from .._control import RankError
from .layout import default_tag, published_tags
from .load import check_shapes, load_full, open_checkpoint
from .problems import CheckpointError
from .publish import save
from .read import Checkpoint
from .shards import SaveConfig
from .verify import verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "RankError",
    "SaveConfig",
    "check_shapes",
    "default_tag",
    "load_full",
    "open_checkpoint",
    "published_tags",
    "save",
    "verify",
]
