"""Whether all ranks mean the same, found out before messages would hang or be misread."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist

from ..all_reduce import place_in


def check_agreed(entries: Sequence[str], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Compare ``entries`` with those of the other ranks, by 8 bytes. All ranks call it.

    Args:
        entries: What has to be equal on all ranks, in words.
        group: The ranks; None as in :class:`~..all_reduce.CompressedAllReduce`.
        device: One that the group's backend serves.

    Raises:
        ValueError: On all ranks: they differ; the text holds the first difference.

    Example:
        >>> check_agreed(["parameter 0: shape (3,)"], None, torch.device("cpu"))  # alone: nothing to compare
    """
    _, size = place_in(group)
    if size == 1:
        return
    digest = hashlib.sha256("\n".join(entries).encode()).digest()
    own = torch.tensor(int.from_bytes(digest[:7], "little"), dtype=torch.int64, device=device)
    digests = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(digests, own, group=group)
    if torch.stack(digests).unique().numel() == 1:
        return
    found: list[list[str]] = [[]] * size
    dist.all_gather_object(found, list(entries), group=group)
    for row in zip_longest(*found, fillvalue="nothing"):
        if len(set(row)) > 1:
            first = next(rank for rank, entry in enumerate(row) if entry != row[0])
            raise ValueError(
                "all ranks must give an optimizer that exchanges messages the same parameters and settings; got on "
                f"rank 0: {row[0]}; on rank {first}: {row[first]}"
            )
    raise ValueError(f"ranks of one digest must hold the same; got {len(found)} different ones: compare their settings")
