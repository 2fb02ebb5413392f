"""A block of code in which some parameters are whole, and what it changed becomes everybody's, or is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .intervals import agreed, from_rank
from .texts import shown
from .units import Phase, Presence

if TYPE_CHECKING:
    from .flat import Flat
    from .layout import Slot
    from .mesh import Mesh
    from .units import Residency, Unit


class Target(NamedTuple):
    """A parameter to be made whole."""

    param: nn.Parameter
    flat: Flat
    slot: Slot


class _Before(NamedTuple):
    """A parameter as it was when the block began."""

    view: Tensor  # of the whole parameters
    copy: Tensor | None  # None where a change would be dropped with the memory
    version: int


@contextmanager
def whole_within(
    targets: Sequence[Target], units: Sequence[Unit], residency: Residency, mesh: Mesh, writer: int | None
) -> Iterator[None]:
    """Make ``targets`` whole within the block; see :meth:`ds_zero.access.Access.gathered`.

    Args:
        targets: The parameters.
        units: The sharded units that hold them; none where parameters are replicated.
        residency: Brings units in.
        mesh: The ranks.
        writer: The rank whose changes count; None: nobody's.
    """
    index = None if writer is None else _shard_index(writer, mesh)
    added = [unit for unit in units if unit not in residency.in_use]
    for unit in units:
        residency.need(unit, Phase.FORWARD)
    copies = not units or mesh.everyone.rank == index
    before = [_before(target.param, copies=copies) for target in targets]
    kept = False
    try:
        yield
        _check_still_whole(units)
        written = _agreed_changes(targets, before, mesh, index)
        for target, old, changed in zip(targets, before, written, strict=True):
            if changed and index is not None:
                from_rank(old.view, index, mesh.everyone)
                target.flat.keep_changed(target.slot, old.view.reshape(-1))
        kept = True
    finally:
        if not kept:
            _restore(targets, before, residency, sharded=bool(units))
        for unit in added:
            residency.idle(unit)


def _before(param: nn.Parameter, *, copies: bool) -> _Before:
    return _Before(param.data, param.detach().clone() if copies else None, param._version)


def _agreed_changes(targets: Sequence[Target], before: Sequence[_Before], mesh: Mesh, index: int | None) -> list[bool]:
    """Return which parameters the writer changed; raise on all ranks if another rank did, and nothing is kept then."""
    misshapen = [target.param.shape != old.view.shape for target, old in zip(targets, before, strict=True)]
    flags = [
        wrong or _has_changed(target.param, old) for target, old, wrong in zip(targets, before, misshapen, strict=True)
    ]
    rows = agreed(flags + misshapen, mesh.everyone, before[0].view.device) if flags else []
    _check_shapes(targets, [any(row[len(flags) + number] for row in rows) for number in range(len(flags))])
    rows = [row[: len(flags)] for row in rows]
    written = [False] * len(flags) if index is None or not rows else rows[index]
    lost = {
        target.slot.name: None
        for row in rows
        for target, changed, counts in zip(targets, row, written, strict=True)
        if changed and not counts
    }
    if not lost:
        return written
    who = "no rank may" if index is None else "only the rank of writeback_from may"
    raise RuntimeError(
        f"{shown(lost)}: changed within gathered(), where {who} change parameters; all changes of the block were "
        "undone. Say gathered(..., writeback_from=RANK), and make the change on that rank (or the same one on all)"
    )


def _check_shapes(targets: Sequence[Target], misshapen: Sequence[bool]) -> None:
    names = [target.slot.name for target, wrong in zip(targets, misshapen, strict=True) if wrong]
    if names:
        raise ValueError(
            f"{shown(names)}: given data of another shape within gathered() on some rank; all changes "
            "of the block were undone. Shapes cannot change once a model is partitioned"
        )


def _check_still_whole(units: Sequence[Unit]) -> None:
    gone = [unit.name for unit in units if unit.presence is not Presence.WHOLE]
    if gone:
        raise RuntimeError(
            f"{', '.join(gone)}: partitioned again within gathered(), by a step or a forward pass, so changes of the "
            "block may be lost: leave the block before"
        )


def _has_changed(param: nn.Parameter, before: _Before) -> bool:
    if param.data_ptr() != before.view.data_ptr():  # its data were replaced
        before.view.copy_(param.data)
        param.data = before.view
        if before.copy is None:
            return True
    if before.copy is None:
        return param._version != before.version
    return not torch.equal(_bits(before.view), _bits(before.copy))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _restore(targets: Sequence[Target], before: Sequence[_Before], residency: Residency, *, sharded: bool) -> None:
    with torch.no_grad():
        for target, old in zip(targets, before, strict=True):
            target.param.data = old.view
            # partitioned again meanwhile, the memory is gone, and the change with it
            if old.copy is not None and old.view.untyped_storage().nbytes():
                old.view.copy_(old.copy)
    if sharded:
        residency.drop_all()  # and with it all that was written into gathered memory


def _shard_index(rank: int, mesh: Mesh) -> int:
    """Return the index of a rank in the order of shards, see [Note: Order of shards]."""
    if not 0 <= rank < mesh.everyone.size:
        raise ValueError(f"writeback_from is a rank from 0 to {mesh.everyone.size - 1}, got {rank}")
    node, index = divmod(rank, mesh.node.size)
    return index * mesh.across.size + node
