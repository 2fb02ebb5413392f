"""The entry point ``tensor`` of group ``ds.tensor``: splits models as a configuration says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from .blocks import Blocks
from .config import TensorConfig
from .planning import no_match
from .splitting import PlannedSplit
from .sums import Ranks

if TYPE_CHECKING:
    from ds_core.protocols import BuildContext


class BlockSplitter:
    """Plays the role ``Splitter``.

    Args:
        config: How to split.
        group: Over which ranks; None: this one.

    Raises:
        ValueError: There are more or fewer ranks than the configuration says.
    """

    def __init__(self, config: TensorConfig, group: dist.ProcessGroup | None) -> None:
        self._plan = config.plan()
        self._num_blocks = config.num_blocks
        self._ranks = Ranks(group)
        if self._ranks.size != config.autotp_size:
            raise ValueError(f"autotp_size = {config.autotp_size} ranks are needed; got a group of {self._ranks.size}")

    def plan(self, module: nn.Module, *, keep: Collection[str] = ()) -> PlannedSplit:
        """Return how a model, or a part of one, will be split; see :func:`ds_pipe.tensor.split`."""
        return PlannedSplit(module, self._plan, Blocks(self._num_blocks, self._ranks), keep=keep)

    def no_match(self, patterns: Sequence[str], layers: Sequence[str]) -> str:
        """Return what to say about patterns that match nothing in a model that has ``layers``."""
        return no_match(patterns, layers)


class _Plugin:
    """See [Note: Plugins] in ds-core."""

    role_version = 1
    config_type = TensorConfig

    def build(self, config: TensorConfig, context: BuildContext) -> BlockSplitter:
        """Return what splits models over the ranks of ``context``."""
        return BlockSplitter(config, context.group)


tensor = _Plugin()
