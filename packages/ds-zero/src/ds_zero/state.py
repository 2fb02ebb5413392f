"""State as named pieces: what a checkpoint writes and reads, whatever the ranks and the stage.

[Note: Pieces]
A piece is a flat interval of one named tensor. A rank exports the pieces that lie in its shard, also where it holds
more (replicated state is written once, in parallel), so over all ranks every element stands exactly once. Reading
goes the other way round: each rank asks for the intervals its own layout needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .flat import Flat, Segment
from .texts import shown

if TYPE_CHECKING:
    from ds_core.protocols import Json, StateSource

PLAIN = (bool, int, float, str, type(None))

Key = tuple[str, str]
"""Role and name of a tensor."""


class Piece(NamedTuple):
    """A flat interval of one tensor."""

    name: str
    role: str  # "param", "buffer", "grad", or the optimizer's name of it
    shape: torch.Size  # of the whole tensor
    start: int  # first element, in the row-major flattened tensor
    data: Tensor  # 1D, a view of live memory


class PartState(NamedTuple):
    """All state of a partitioned model."""

    pieces: list[Piece]
    shapes: dict[str, torch.Size]
    scalars: dict[str, Json]


# Export #


def param_pieces(flat: Flat) -> Iterator[Piece]:
    """Yield this rank's part of the exact parameters."""
    yield from interval_pieces(flat, "param", flat.master, flat.state_range[0])


def grad_pieces(flat: Flat) -> Iterator[Piece]:
    """Yield this rank's part of the gradient sums."""
    if flat.gradient is not None:
        yield from interval_pieces(flat, "grad", flat.gradient.reduced(), flat.own[0])


def optimizer_pieces(flat: Flat, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """Yield this rank's part of the optimizer's tensors."""
    for segment in flat.segments:
        for role, value in optimizer.state.get(segment.master, {}).items():
            if _is_elementwise(value, segment):
                yield from interval_pieces(flat, role, value, segment.start)


def interval_pieces(flat: Flat, role: str, values: Tensor, first: int) -> Iterator[Piece]:
    """Yield what ``values``, which stands at ``first`` in the layout, holds of this rank's own shard."""
    start, end = max(flat.own[0], first), min(flat.own[1], first + values.numel())
    for overlap in flat.layout.overlaps(start, end):
        offset = start - first + overlap.offset
        data = values.detach()[offset : offset + overlap.numel]
        yield Piece(overlap.slot.name, role, overlap.slot.shape, overlap.start, data)


def buffer_pieces(buffers: Mapping[str, Tensor], rank: int) -> Iterator[Piece]:
    """Yield the model's buffers, on rank 0: every rank holds the same."""
    if rank == 0:
        for name, buffer in buffers.items():
            yield Piece(name, "buffer", buffer.shape, 0, buffer.detach().reshape(-1))


def optimizer_scalars(flats: Sequence[Flat], optimizer: torch.optim.Optimizer) -> dict[str, Json]:
    """Return hyperparameters, roles and counters: equal for all shards of an elementwise optimizer."""
    counters: dict[str, dict[str, Json]] = {}  # by parameter group, whose shards all count alike
    roles: dict[str, list[str]] = {}  # by parameter group
    for flat in flats:
        for segment in flat.segments:
            held = optimizer.state.get(segment.master, {})
            elementwise = sorted(key for key, value in held.items() if _is_elementwise(value, segment))
            if held:
                roles[str(segment.group)] = elementwise
            for key in held.keys() - set(elementwise):
                counters.setdefault(str(segment.group), {})[key] = _encode_counter(key, held[key])
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups, "counters": {**counters}, "roles": {**roles}}


# Import #


def wanted(
    flats: Sequence[Flat], trained: Sequence[Flat], buffers: Mapping[str, Tensor], source: StateSource
) -> dict[Key, torch.Size]:
    """Return the shape of every tensor to load; of the optimizer's roles those that ``source`` has."""
    shapes: dict[Key, torch.Size] = {("buffer", name): buffer.shape for name, buffer in buffers.items()}
    shapes |= {("param", slot.name): slot.shape for flat in flats for slot in flat.layout.slots}
    # of a parameter without elements no state is kept
    for slot in (slot for flat in trained for slot in flat.layout.slots if slot.numel):
        shapes |= {(role, slot.name): slot.shape for role in _optimizer_roles(source, slot.group)}
    return shapes


def check_tensors(shapes: Mapping[Key, torch.Size], source: StateSource, *, strict: bool) -> set[Key]:
    """Return which of the tensors ``source`` holds.

    Raises:
        ValueError: One has another shape there, or with ``strict`` is missing.
    """
    held = {(role, name): shape for role in source.roles for name, shape in source.shapes_of(role).items()}
    problems = [
        f"{role} {name!r} has shape {list(shape)} here and {list(held[role, name])} there"
        for (role, name), shape in shapes.items()
        if held.get((role, name), shape) != shape
    ]
    if strict:
        problems += [f"{role} {name!r} is missing there" for role, name in shapes if (role, name) not in held]
    if problems:
        raise ValueError(f"the state to load does not fit: {shown(problems, between='; ')}; nothing was changed")
    return held.keys() & shapes.keys()


def load_params(flat: Flat, source: StateSource, known: Collection[Key]) -> None:
    """Fill the master from ``source``, as far as it is ``known`` there."""
    first, last = flat.state_range
    for overlap in flat.layout.overlaps(first, last):
        if ("param", overlap.slot.name) in known:
            part = flat.master[overlap.offset : overlap.offset + overlap.numel]
            source.read("param", overlap.slot.name, overlap.start, part)


def load_buffers(buffers: Mapping[str, Tensor], source: StateSource, known: Collection[Key]) -> None:
    """Fill the model's buffers from ``source``, as far as they are ``known`` there."""
    for name, buffer in buffers.items():
        if ("buffer", name) in known:
            flat = torch.empty(buffer.numel(), dtype=buffer.dtype, device=buffer.device)
            source.read("buffer", name, 0, flat)
            buffer.copy_(flat.view(buffer.shape))


def check_optimizer(optimizer: torch.optim.Optimizer, scalars: Mapping[str, Any]) -> None:
    """Refuse state of another optimizer class, or with other parameter groups."""
    got, want = scalars.get("class"), type(optimizer).__name__
    if got != want:
        raise ValueError(
            f"the checkpoint holds the state of optimizer {got}, this run uses {want}: use the same optimizer, or load "
            "without optimizer state (load_optimizer_states=False)"
        )
    num_saved, num_here = len(scalars["groups"]), len(optimizer.param_groups)
    if num_saved != num_here:
        raise ValueError(f"the checkpoint has {num_saved} optimizer parameter groups, this run has {num_here}")


def load_optimizer(
    flats: Sequence[Flat],
    optimizer: torch.optim.Optimizer,
    source: StateSource,
    scalars: Mapping[str, Any],
    known: Collection[Key],
) -> None:
    """Replace the optimizer's state and hyperparameters by those of ``source``, as far as ``known`` there."""
    for flat in flats:
        for segment in flat.segments:
            counters = scalars["counters"].get(str(segment.group), {})
            state = {key: _decode_counter(value) for key, value in counters.items()}
            before = optimizer.state.pop(segment.master, {})
            for role in _optimizer_roles(source, segment.group):
                values = before.get(role, torch.zeros_like(segment.master, requires_grad=False))
                state[role] = values
                for overlap in flat.layout.overlaps(segment.start, segment.start + values.numel()):
                    if (role, overlap.slot.name) in known:
                        part = values[overlap.offset : overlap.offset + overlap.numel]
                        source.read(role, overlap.slot.name, overlap.start, part)
            if state:
                optimizer.state[segment.master] = state
    for group, saved in zip(optimizer.param_groups, scalars["groups"], strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _optimizer_roles(source: StateSource, group: int) -> list[str]:
    """Return the roles of the elementwise state of one parameter group."""
    saved = cast("Mapping[str, Any]", source.scalars["optimizer"])
    return list(saved["roles"].get(str(group), ()))


def _is_elementwise(value: Any, segment: Segment) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == segment.master.shape


def _encode_counter(key: str, value: Any) -> Json:
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"tensor": str(value.dtype).removeprefix("torch."), "value": value.item()}
    if isinstance(value, PLAIN):
        return {"value": value}
    raise NotImplementedError(
        f"optimizer state {key!r} is neither elementwise nor a number: {type(value).__name__}"
        f"{list(value.shape) if isinstance(value, Tensor) else ''}; this optimizer cannot be saved"
    )


def _decode_counter(saved: Mapping[str, Any]) -> Any:
    if "tensor" in saved:
        return torch.tensor(saved["value"], dtype=getattr(torch, saved["tensor"]))
    return saved["value"]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN) or (isinstance(value, Tensor) and value.numel() == 1)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def aliases(model: nn.Module) -> dict[str, Json]:
    """Return, for each further name of a tied parameter, the name it is stored under."""
    first: dict[nn.Parameter, str] = {}
    further: dict[str, Json] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if first.setdefault(param, name) != name:
            further[name] = first[param]
    return further


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the model's state, by name."""
    buffers = dict(model.named_buffers())
    for module_name, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffers.pop(f"{module_name}.{name}" if module_name else name, None)
    return buffers
