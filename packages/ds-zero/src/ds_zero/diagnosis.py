"""What is put around the collectives to find out why ranks hang; nothing, unless the configuration asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from .backends import sends_tagged
from .board import Board
from .checked import CheckedCollectives, Label
from .config import ZeroConfig
from .watch import Watch
from .watched import WatchedCollectives, note_places

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from .units import Unit


class Diagnosis:
    """Fingerprints and watchdog of one partitioned model.

    Args:
        config: Which of them.
        group: The ranks; None: a process that works alone, which has nothing to wait for.
    """

    def __init__(self, config: ZeroConfig, group: dist.ProcessGroup | None) -> None:
        asked = config.fingerprint_timeout or config.watchdog_timeout
        self._board = Board(group) if asked and group is not None and dist.get_world_size(group) > 1 else None
        self._config = config
        self._blocks = group is not None and sends_tagged(group)
        self._labels: dict[int, Label] = {}
        self._units: dict[int, str] = {}
        self._watch: Watch | None = None

    def around(self, comm: Collectives, who: str) -> Collectives:
        """Return ``comm``, which joins ``who``, with what was asked for around it: ``comm`` itself if nothing."""
        if self._board is None or comm.size == 1:
            return comm
        if self._config.watchdog_timeout:
            self._watch = self._watch or Watch(self._board, self._config.watchdog_timeout)
            self._watch.start()
            comm = WatchedCollectives(comm, self._watch, self._units, who=who, blocks=self._blocks)
        if self._config.fingerprint_timeout:
            comm = CheckedCollectives(
                comm,
                self._board,
                self._labels,
                who=who,
                timeout=self._config.fingerprint_timeout,
                ordered=not self._blocks,
            )
        return comm

    def learn(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Take the names over, and note in the model's modules where a rank is."""
        for unit in units:
            for flat in unit.flats:
                self._labels[flat.key] = Label(unit.name, tuple(slot.name for slot in flat.layout.slots))
                self._units[flat.key] = unit.name
        if self._watch is not None:
            note_places(model, {module: unit.name for unit in units for module in unit.modules}, self._watch)
