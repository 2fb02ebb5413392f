"""Whether all ranks mean the same, found out before messages would hang or be misread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..all_reduce import place_in
from ..messages import device_of

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""``[n]`` of every rank as ``[ranks, n]``, in the order of ranks; all ranks call it."""

_SETTINGS = (bool, int, float, str, tuple)


def check_agreed(entries: Sequence[str], group: dist.ProcessGroup | None) -> None:
    """Compare ``entries`` with those of the other ranks, by 8 bytes. All ranks call it.

    Args:
        entries: What has to be equal on all ranks, in words.
        group: The ranks; None as in :class:`~..all_reduce.CompressedAllReduce`.

    Raises:
        ValueError: On all ranks: they differ; the text holds the first difference.

    Example:
        >>> check_agreed(["parameter 0: shape (3,)"], None)  # alone: nothing to compare
    """
    _, size = place_in(group)

    def gather(row: Tensor) -> Tensor:
        rows = torch.empty(size, len(row), dtype=row.dtype, device=row.device)
        dist.all_gather(list(rows), row, group=group)
        return rows

    if size > 1:
        compare(entries, gather, device_of(group))


def compare(entries: Sequence[str], gather: Gather, device: torch.device) -> None:
    """Do as :func:`check_agreed`, by ``gather``.

    Args:
        entries: What has to be equal on all ranks, in words.
        gather: Gathers rows of int64.
        device: Where ``gather`` takes them.

    Raises:
        ValueError: On all ranks: they differ; the text holds the first difference.

    Example:
        >>> compare(["step = 3"], lambda row: torch.stack((row, row)), torch.device("cpu"))
    """
    text = "\n".join(entries).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
    rows = gather(torch.tensor([digest, len(text)], device=device)).tolist()
    if all(row == rows[0] for row in rows):
        return
    longest = max(length for _, length in rows)
    codes = gather(torch.tensor([*text.ljust(longest)], dtype=torch.int64, device=device)).tolist()
    found = [
        bytes(own[:length]).decode().split("\n") if length else [] for own, (_, length) in zip(codes, rows, strict=True)
    ]
    for each in zip_longest(*found, fillvalue="nothing"):
        if len(set(each)) > 1:
            first = next(rank for rank, entry in enumerate(each) if entry != each[0])
            raise ValueError(
                "all ranks must give an optimizer that exchanges messages the same parameters and settings; got on "
                f"rank 0: {each[0]}; on rank {first}: {each[first]}"
            )
    raise ValueError(f"ranks of one text must have one digest; got {rows}: a message between them was damaged")


def settings_of(optimizer: object) -> list[str]:
    """Return in words the settings that ``optimizer`` keeps as its attributes: public ones that are plain values.

    Example:
        >>> from types import SimpleNamespace
        >>> settings_of(SimpleNamespace(freeze_step=3, nesterov=True, _ready=False))
        ['freeze_step = 3', 'nesterov = True']
    """
    return [
        f"{name} = {value}"
        for name, value in sorted(vars(optimizer).items())
        if not name.startswith("_") and isinstance(value, _SETTINGS)
    ]
