"""The entry point ``tensor`` of group ``ds.tensor``: splits models as a configuration says."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from .blocks import Blocks
from .config import TensorConfig
from .splitting import Split, no_match, split_part
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

    def split(self, module: nn.Module, *, keep: Collection[str] = ()) -> Split:
        """Split a model, or a part of one, in place; see :func:`ds_pipe.tensor.split`."""
        return split_part(module, self._plan, Blocks(self._num_blocks, self._ranks), keep=keep)

    def no_match(self, patterns: Collection[str], module: nn.Module) -> str:
        """Return what to say about patterns that match nothing in the whole model."""
        return no_match(sorted(patterns), module)


class _Plugin:
    """See [Note: Plugins] in ds-core."""

    role_version = 1
    config_type = TensorConfig

    def build(self, config: TensorConfig, context: BuildContext) -> BlockSplitter:
        """Return what splits models over the ranks of ``context``."""
        return BlockSplitter(config, context.group)


tensor = _Plugin()
