"""State of a whole partitioned model: parameters, buffers and the optimizer's, on shards and on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from . import owed, state, whole_state

if TYPE_CHECKING:
    from ds_core.protocols import Json, StateSource

    from .flat import Flat, Resources
    from .mesh import Mesh
    from .own import OwnGradients
    from .whole import WholeTensors


def export(
    module: nn.Module,
    flats: Sequence[Flat],
    optimizer: torch.optim.Optimizer | None,
    whole: WholeTensors,
    *,
    own: OwnGradients,
    shared: Resources,
) -> state.PartState:
    """Return live views of all state on this rank."""
    buffers = state.persistent_buffers(module)
    pieces = [piece for flat in flats for piece in state.param_pieces(flat)]
    pieces += state.buffer_pieces(buffers, shared.mesh.everyone.rank)
    scalars: dict[str, Json] = {"aliases": state.aliases(module)}
    if optimizer is not None:
        trained = _trained(flats)
        for flat in trained:
            pieces += state.optimizer_pieces(flat, optimizer)
        pieces += whole_state.pieces(whole, optimizer)
        pieces += owed.pieces(trained, shared.wire, shared.mesh.across)
        pieces += own.pieces()
        scalars["optimizer"] = {
            **state.optimizer_scalars(trained, optimizer),
            **whole_state.scalars(whole, optimizer),
        }
    shapes = {slot.name: slot.shape for flat in flats for slot in flat.layout.slots}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    return state.PartState(pieces, shapes, scalars)


def prepare_load(
    module: nn.Module,
    flats: Sequence[Flat],
    optimizer: torch.optim.Optimizer | None,
    whole: WholeTensors,
    source: StateSource,
    *,
    own: OwnGradients,
    wire: Mesh,
    strict: bool,
) -> Callable[[], None]:
    """Check that ``source`` fits; return what loads it. Sharded parameters must not be whole while it does.

    Raises:
        ValueError: A tensor is missing or has another shape, or the optimizer is another one; nothing was changed.
    """
    saved = cast("Mapping[str, Any]", source.scalars.get("optimizer") or {})
    buffers = state.persistent_buffers(module)
    if optimizer is not None:
        state.check_optimizer(optimizer, saved)
        whole_state.check(whole, saved)
    trained = _trained(flats) if optimizer is not None else []
    wanted = state.wanted(flats, trained, buffers, source)
    wanted |= whole_state.wanted(trained, saved)
    known = state.check_tensors(wanted, source, strict=strict)

    def load() -> None:
        for flat in flats:
            state.load_params(flat, source, known)
            refresh = flat.load_master()
            if refresh is not None:
                refresh.wait()
        whole.refresh()
        state.load_buffers(buffers, source, known)
        if optimizer is not None:
            state.load_optimizer(trained, optimizer, source, saved, known)
            whole_state.load(whole, optimizer, source, saved, known)
            owed.load(trained, wire, source)
            own.load(source)

    return load


def _trained(flats: Sequence[Flat]) -> list[Flat]:
    return [flat for flat in flats if flat.gradient is not None]
