"""Settings of the partitioner."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """What is partitioned, and how strictly.

    Field names follow the ``zero_optimization`` section of a DeepSpeed config where the meaning is the same.

    Example:
        >>> ZeroConfig(stage=3).stage
        3
    """

    stage: int = 0
    """0: nothing is partitioned; 1: optimizer state; 2: and gradients; 3: and parameters (ZeRO, Rajbhandari et
    al., 2020). The default is DeepSpeed's."""

    unit_classes: tuple[str, ...] = ()
    """Class names of the modules whose parameters travel together. Empty: the children of ``ModuleList`` and
    ``Sequential`` containers, which finds the blocks of the usual models."""

    require_exact: bool = False
    """Refuse a number of ranks on which the bits cannot equal those of one rank (any that is not a power of
    two), instead of saying so once."""

    host_memory: bool = True
    """Whether CPU ranks that all run on one host read each other's memory instead of sending messages."""

    mics_shard_size: int = -1
    """Ranks of a node (consecutive ranks); state is sharded within each node and repeated on all of them (hybrid
    sharding, MiCS). -1: all ranks are one node."""

    zero_hpz_partition_size: int = 1
    """Ranks of a node; at stage 3 parameters are sharded within each node and repeated on all of them, gradients and
    optimizer state are sharded over all ranks. 1: parameters, too, are sharded over all ranks."""

    fingerprint_timeout: float | None = None
    """Seconds to wait for the other ranks before each collective, to compare what they are about to do: a mismatch is
    an error that names both sides, not a hang. None compares nothing. For debugging: it keeps all ranks in step, and
    ranks of one host send messages."""

    watchdog_timeout: float | None = None
    """Seconds a rank may wait in a collective before the run ends with the name of the rank and the unit that is late.
    Then an exception or the death of one rank ends all of them, with its text. None watches nothing; 600 suits most
    runs."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero stage is one of 0, 1, 2, 3; got {self.stage!r}")
        check_names("unit_classes", self.unit_classes)
        if self.mics_shard_size == 0 or self.mics_shard_size < -1 or self.zero_hpz_partition_size < 1:
            raise ValueError(
                "the ranks of a node are a positive number: got mics_shard_size = "
                f"{self.mics_shard_size}, zero_hpz_partition_size = {self.zero_hpz_partition_size}"
            )
        if self.mics_shard_size > 0 and self.zero_hpz_partition_size > 1:
            raise ValueError("mics_shard_size and zero_hpz_partition_size exclude each other: set one of them")
        if self.zero_hpz_partition_size > 1 and self.stage != 3:
            raise ValueError(f"zero_hpz_partition_size is about sharded parameters: it needs stage 3, got {self.stage}")
        for name in ("fingerprint_timeout", "watchdog_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name} is a number of seconds above 0, or None; got {seconds!r}")

    @property
    def node_size(self) -> int | None:
        """Ranks of a node; None: all."""
        if self.mics_shard_size > 0:
            return self.mics_shard_size
        return self.zero_hpz_partition_size if self.zero_hpz_partition_size > 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Data types of training; the optimizer always works on float32.

    Example:
        >>> Precision(compute=torch.bfloat16).gradient
        torch.float32
    """

    compute: torch.dtype | None = None
    """Of parameters in forward and backward, and of gradients on the wire; None: the model's own."""

    gradient: torch.dtype = torch.float32
    """Of gradient sums until the step. Half the memory in bfloat16, at the price of rounding each partial sum,
    which makes the result depend on the number of ranks."""

    keep_fp32: tuple[str, ...] = ()
    """Modules that stay in float32 where ``compute`` is lower: names of their classes (``"LayerNorm"``), or parts of
    their qualified names. See [Note: Kept modules]."""

    def __post_init__(self) -> None:
        check_names("keep_fp32", self.keep_fp32)
        for name, dtype in (("compute", self.compute), ("gradient", self.gradient)):
            if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} data type is float32, bfloat16 or float16; got {dtype}")


def check_names(what: str, names: Iterable[str]) -> None:
    """Refuse a string where several are expected: it would be taken letter by letter.

    Raises:
        ValueError: ``names`` is a string.

    Example:
        >>> check_names("unit_classes", ("Block",))
    """
    if isinstance(names, str):
        raise ValueError(f"{what} is a sequence of names; got the string {names!r}; write ({names!r},)")
