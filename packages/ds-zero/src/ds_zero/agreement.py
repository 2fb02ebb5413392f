"""What ranks have to have in common before they work together: compared once, and named where they differ."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import sends_tagged
from .texts import shown

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from .config import Precision, ZeroConfig
    from .kinds import Arranged

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""``[n]`` of every rank as ``[ranks, n]``, in the order of ranks; all ranks call it."""

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)


class Fingerprint(NamedTuple):
    """Something that is the same on all ranks, or is not."""

    name: str
    number: int  # 64 bits


class Difference(NamedTuple):
    """What ranks have not in common with rank 0."""

    ranks: list[int]
    counts: list[int]  # of fingerprints, on each rank
    names: list[str]  # of the fingerprints that differ on some rank; empty where their numbers do


def number_of(data: bytes) -> int:
    """Return 64 bits that stand for ``data``."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def difference(prints: Sequence[Fingerprint], gather: Gather, device: torch.device) -> Difference | None:
    """Return in what the ranks' fingerprints differ; None if in nothing. Sends 16 bytes, more only if they differ."""
    whole = number_of("".join(f"{name}={number};" for name, number in prints).encode())
    rows = gather(torch.tensor([whole, len(prints)], device=device)).tolist()
    ranks = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if not ranks:
        return None
    counts = [count for _, count in rows]
    if len(set(counts)) > 1:
        return Difference(ranks, counts, [])
    table = gather(torch.tensor([number for _, number in prints], device=device))
    columns = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    return Difference(ranks, counts, [prints[column].name for column in columns])


def check_settings_agree(
    config: ZeroConfig,
    precision: Precision,
    arranged: Arranged,
    *,
    group: dist.ProcessGroup | None,
    given: Collectives | None,
    device: torch.device,
) -> None:
    """Raise, on all ranks, if they were given different settings: they would wait for each other, or diverge.

    Args:
        config: Of the partitioner.
        precision: Data types.
        arranged: The optimizer, and its groups.
        group: The ranks; None is a single process.
        given: Collectives to use instead of ``group``'s.
        device: Where the data lie; on the meta device nothing is compared.

    Raises:
        ValueError: They differ; the text names ranks and settings.
    """
    if device.type == "meta" or (group is None and given is None):
        return
    gather = _gather_of(group) if given is None else given.gather_rows
    on = device if group is None or not sends_tagged(group) else torch.device("cpu")
    prints = [Fingerprint(name, number_of(text.encode())) for name, text in _settings(config, precision, arranged)]
    found = difference(prints, gather, on)
    if found is not None:
        what = shown(found.names) or "the number of the optimizer's parameter groups, or of their settings"
        raise ValueError(
            f"ranks {found.ranks} were given other settings than rank 0: {what}. Pass the same on every rank"
        )


def _gather_of(group: dist.ProcessGroup | None) -> Gather:
    def gather(row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row, group=group)
        return torch.stack(rows)

    return gather


def _settings(config: ZeroConfig, precision: Precision, arranged: Arranged) -> Iterator[tuple[str, str]]:
    for section in (config, precision):
        for field in dataclasses.fields(section):
            yield f"{type(section).__name__}.{field.name}", repr(getattr(section, field.name))
    yield "the class of the optimizer", arranged.optimizer
    for index, entry in enumerate(arranged.groups):
        yield f"parameters of group {index}", repr([tuple(param.shape) for param in entry["params"]])
        for key in sorted(entry.keys() - {"params"}):
            yield f"{key} of group {index}", _text(entry[key])


def _text(value: Any) -> str:
    """Say a setting so that equal ones read alike in different processes."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Tensor) and value.numel() == 1:
        return repr(value.item())
    return type(value).__qualname__
