"""Merging the ranks' shares into one manifest, after checking that together they are a whole checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

from .manifest import RAW, FileRecord, Manifest, PieceRecord, Share, TensorRecord, canonical
from .pieces import Interval, faults
from .problems import listing

if TYPE_CHECKING:
    from ..protocols import Json

MODEL_ROLES: Final = ("param", "buffer")
"""Roles of the tensors that make up a model; all others are the optimizer's."""


class Records(NamedTuple):
    """The shares' records with indices into common lists."""

    tensors: list[TensorRecord]
    files: list[FileRecord]
    pieces: list[PieceRecord]


def assemble(shares: Sequence[Share], *, run: Mapping[str, Json], previous: str | None, created_ns: int) -> Manifest:
    """Return the manifest of a checkpoint that the ranks wrote together.

    Args:
        shares: What each rank wrote, in rank order.
        run: State of the training run.
        previous: Tag that ``latest`` names.
        created_ns: Now.

    Returns:
        The manifest.

    Raises:
        ValueError: An element stands in no piece or in two, or ranks contradict each other; it lists where.
    """
    merged = _merge(shares)
    shapes, contradictions = _common_shapes(shares)
    merged.tensors.extend(_empty_params(merged.tensors, shapes))
    scalars, differences = _common_scalars(shares)
    problems = [
        *differences,
        *contradictions,
        *_record_problems(merged.tensors),
        *_model_problems(merged.tensors, shapes),
        *coverage_problems(merged.tensors, merged.files, merged.pieces),
    ]
    if problems:
        raise ValueError(
            f"the state of {len(shares)} rank(s) does not make a whole checkpoint, nothing was published:\n"
            f"{listing(problems)}"
        )
    return Manifest(
        world_size=len(shares),
        created_ns=created_ns,
        previous=previous,
        run=run,
        scalars=scalars,
        **merged._asdict(),
    )


def coverage_problems(
    tensors: Sequence[TensorRecord], files: Sequence[FileRecord], pieces: Sequence[PieceRecord]
) -> Iterator[str]:
    """Yield one line for each interval of a tensor that does not stand exactly once."""
    pieces_of = defaultdict(list)
    for piece in pieces:
        pieces_of[piece.tensor].append(piece)
    for index, tensor in enumerate(tensors):
        own = pieces_of[index]
        for interval, missing in faults(own, prod(tensor.shape)):
            where = f"{tensor} of shape {list(tensor.shape)}: elements {interval}"
            if missing:
                yield f"{where} stand in no piece"
            else:
                owners = sorted({files[p.file].name for p in own if _overlap(p, interval)})
                yield f"{where} stand in more than one piece, in {', '.join(owners)}"


def _overlap(piece: PieceRecord, interval: Interval) -> bool:
    return piece.start < interval.end and interval.start < piece.end


def _merge(shares: Sequence[Share]) -> Records:
    merged = Records([], [], [])
    index_of: dict[TensorRecord, int] = {}
    for share in shares:
        for tensor in share.tensors:
            if tensor not in index_of:
                index_of[tensor] = len(merged.tensors)
                merged.tensors.append(tensor)
        first_file = len(merged.files)
        merged.files.extend(share.files)
        merged.pieces.extend(
            piece._replace(tensor=index_of[share.tensors[piece.tensor]], file=first_file + piece.file)
            for piece in share.pieces
        )
    return merged


def _common_scalars(shares: Sequence[Share]) -> tuple[dict[str, Json], list[str]]:
    """Return all ranks' scalars in one mapping: a rank that holds nothing of the optimizer may know fewer of them."""
    scalars: dict[str, Json] = {}
    problems: list[str] = []
    for rank, text in enumerate(share.scalars for share in shares):
        if rank == 0 or text != shares[0].scalars:
            _unite(scalars, json.loads(text), f"rank {rank}: scalar ", problems)
    return scalars, problems


def _unite(known: dict[str, Json], said: Mapping[str, Json], path: str, problems: list[str]) -> None:
    for key, value in said.items():
        held = known.setdefault(key, value)
        if isinstance(held, dict) and isinstance(value, dict):
            _unite(held, value, f"{path}{key}.", problems)
        elif canonical(held) != canonical(value):  # as text: NaN is not equal to itself
            problems.append(f"{path}{key} is {value!r}, on a lower rank {held!r}")


def _common_shapes(shares: Sequence[Share]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for rank, share in enumerate(shares):
        for name, shape in share.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                problems.append(f"{name}: rank {rank} says shape {list(shape)}, a lower rank {list(shapes[name])}")
    return shapes, problems


def _record_problems(tensors: Sequence[TensorRecord]) -> Iterator[str]:
    first: dict[tuple[str, str], TensorRecord] = {}
    for tensor in tensors:
        other = first.setdefault((tensor.role, tensor.name), tensor)
        if other is not tensor:
            yield (
                f"{tensor}: one rank has it as {other.dtype} of shape {list(other.shape)}, "
                f"another as {tensor.dtype} of shape {list(tensor.shape)}"
            )


def _empty_params(tensors: Sequence[TensorRecord], shapes: Mapping[str, tuple[int, ...]]) -> list[TensorRecord]:
    """Return records of the model's tensors without elements: there may be no piece that could tell their type."""
    described = {tensor.name for tensor in tensors if tensor.role in MODEL_ROLES}
    names = [name for name, shape in shapes.items() if prod(shape) == 0 and name not in described]
    return [TensorRecord("param", name, shapes[name], "F32", RAW) for name in names]


def _model_problems(tensors: Sequence[TensorRecord], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    model = {tensor.name: tensor for tensor in tensors if tensor.role in MODEL_ROLES}
    for name, shape in shapes.items():
        if name not in model:
            yield f"{name} of shape {list(shape)} is part of the model, but no rank has a piece of it"
    for name, tensor in model.items():
        if name not in shapes:
            yield f"{tensor} has pieces, but is not among the model's shapes"
        elif shapes[name] != tensor.shape:
            yield f"{tensor} has shape {list(tensor.shape)}, the model's shapes say {list(shapes[name])}"
