"""Reading and writing single parameters, gradients and optimizer state of a partitioned model, at every stage.

[Note: Access]
*Full* means the whole tensor on every rank; all ranks call it, in the same order. *Local* means this rank's interval
(see [Note: Intervals]), a view of live memory, read without communication. After a change all that is derived from
what was changed is renewed: low-precision copies, replicas, and whole parameters; so all ranks call what writes, and
if a value does not fit on one of them, all raise before anything is changed. The functions
``safe_get_full_fp32_param``, ``safe_get_local_grad`` and so on of DeepSpeed do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .gathering import Target, whole_within
from .intervals import Interval, agreed, gathered, own_interval, same_on_all
from .placement import Placement
from .texts import shown

if TYPE_CHECKING:
    from .flat import Flat, Resources
    from .layout import Slot
    from .units import Residency, Unit

Param: TypeAlias = str | nn.Parameter
"""A parameter, or its name in the model; a tied one has several."""


class _Place(NamedTuple):
    name: str
    flat: Flat
    number: int  # among the flat's parameters
    slot: Slot


class Calls(NamedTuple):
    """What access asks and tells the partitioned model."""

    check: Callable[[], None]  # raises if state cannot be read and written now
    num_micro_batches: Callable[[], int]  # backward passes that the gradient sums hold
    changed: Callable[[], None]  # is told that parameters or gradients have been changed
    renewed: Callable[[], None]  # is told on all ranks that masters have been changed


class Access:
    """See [Note: Access]. Found at ``sharded.access``.

    Args:
        model: The partitioned model.
        units: All of it.
        optimizer: Over the shards.
        residency: Brings sharded units in.
        shared: What the flats share.
        calls: What is asked and told.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> import ds_zero
        >>> access = ds_zero.shard(model, torch.optim.AdamW, config=ds_zero.ZeroConfig(stage=3)).access
        >>> access.set_full_param("weight", torch.tensor([[1.0, 2.0]]))
        >>> access.full_param(model.weight)
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer | None,
        *,
        residency: Residency,
        shared: Resources,
        calls: Calls,
    ) -> None:
        self._optimizer = optimizer
        self.comm = shared.mesh.everyone
        self._spread = shared.mesh.between(Placement.SHARD, shared.placements.state)
        self._check, self._num_micro_batches, self._changed, self._renewed = calls
        self._model = model
        self._names = dict(model.named_parameters(remove_duplicate=False))
        self._units = units
        self._residency = residency
        self._mesh = shared.mesh
        self._sharded = shared.placements.param is not Placement.REPLICATE
        self._places = {
            param: _Place(slot.name, flat, number, slot)
            for unit in units
            for flat in unit.flats
            for number, (param, slot) in enumerate(zip(flat.params, flat.layout.slots, strict=True))
        }

    # Parameters #

    def full_param(self, param: Param) -> Tensor:
        """Return a copy of a whole parameter: exact, in float32 if it is trained, else in its compute data type."""
        place = self._place(param)
        return self._whole(place, self._local_param(place))

    def set_full_param(self, param: Param, value: Tensor) -> None:
        """Replace a whole parameter by ``value``, which is the same on all ranks."""
        place = self._place(param)
        self._check_whole(place, value)
        flat, first = place.flat, place.flat.state_range[0]
        begin, end = max(first, place.slot.offset), min(flat.state_range[1], place.slot.end)
        if begin < end:
            part = value.detach().reshape(-1)[begin - place.slot.offset : end - place.slot.offset]
            flat.master[begin - first : end - first].copy_(part)
        self._renew(flat)

    def local_param(self, param: Param) -> Interval:
        """Return this rank's interval of a parameter. Write it with :meth:`set_local_param` only."""
        return self._local_param(self._place(param))

    def set_local_param(self, param: Param, value: Tensor) -> None:
        """Replace this rank's interval of a parameter (1D, as long as the interval); all ranks call it."""
        place = self._place(param)
        self._set_local(place, self._local_param(place), value)
        flat = place.flat
        if flat.state_range != flat.own:
            first = flat.state_range[0]
            own = flat.master[flat.own[0] - first : flat.own[1] - first]
            self._spread.all_gather(flat.master, own, key=flat.key).wait()
        self._renew(place.flat)

    # Gradients #

    def full_grad(self, param: Param, *, reduction: str = "mean") -> Tensor:
        """Return a copy of a whole gradient in float32, over all ranks and all micro-batches since the last step.

        Args:
            param: A trained parameter.
            reduction: ``"mean"`` is what the step uses; ``"sum"`` is what is kept. Both are times the loss scale, where
                there is one.

        Raises:
            RuntimeError: There is no gradient.
        """
        place = self._place(param)
        factor = self._grad_factor(reduction)
        return self._whole(place, self._local_grad(place)).float().mul_(factor)

    def set_full_grad(self, param: Param, value: Tensor, *, reduction: str = "mean") -> None:
        """Replace a whole gradient by ``value``, which is the same on all ranks; see :meth:`full_grad`."""
        place = self._place(param)
        self._check_whole(place, value)
        factor = self._grad_factor(reduction)
        own = self._local_grad(place)
        own.data.copy_(value.detach().reshape(-1)[own.start : own.start + own.data.numel()].double() / factor)
        self._grad_changed(place)

    def local_grad(self, param: Param) -> Interval:
        """Return this rank's interval of a gradient *sum*. Write it with :meth:`set_local_grad` only."""
        return self._local_grad(self._place(param))

    def set_local_grad(self, param: Param, value: Tensor) -> None:
        """Replace this rank's interval of a gradient sum (1D, as long as the interval); all ranks call it."""
        place = self._place(param)
        self._set_local(place, self._local_grad(place), value)
        self._grad_changed(place)

    # Optimizer state #

    def full_state(self, param: Param, key: str) -> Tensor:
        """Return a copy of a whole tensor of optimizer state, such as ``"exp_avg"``, in float32.

        Raises:
            KeyError: The optimizer has none of that name; before its first step it has none at all.
        """
        place = self._place(param)
        return self._whole(place, self._checked_state(place, key))

    def set_full_state(self, param: Param, key: str, value: Tensor) -> None:
        """Replace a whole tensor of optimizer state by ``value``, which is the same on all ranks."""
        place = self._place(param)
        self._check_whole(place, value)
        self._checked_state(place, key)
        for start, data in self._state_parts(place, key):
            data.copy_(value.detach().reshape(-1)[start : start + data.numel()])

    def local_state(self, param: Param, key: str) -> Interval:
        """Return this rank's interval of a tensor of optimizer state.

        Write it with :meth:`set_full_state`; where optimizer state is partitioned, its memory may be written, too.
        """
        place = self._place(param)
        own = self._local_state(place, key)
        if own is None:
            raise _no_state(place, key)
        return own

    # All parameters #

    def stored(self) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
        """Yield name, shape and exact data type of every parameter, in model order."""
        for name, param in self._model.named_parameters():
            place = self._place(param)
            yield name, place.slot.shape, place.flat.master.dtype

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter, whole and exact, with its first name, in model order; all ranks go through all of it.

        Memory: one whole tensor and one round of rows (see [Note: Intervals]), if the caller keeps none.
        """
        for name, param in self._model.named_parameters():
            yield name, self.full_param(param)

    @contextmanager
    def gathered(
        self, what: nn.Module | Param | Iterable[Param], *, writeback_from: int | None = None
    ) -> Iterator[None]:
        """Make parameters whole within the block, in the compute data type; all ranks enter and leave it.

        Memory: the units that hold them, and a copy of the parameters (at stage 3 on rank ``writeback_from`` only), by
        which a change is recognised, also one through ``.data``. No step, no forward pass and no other such block with
        ``writeback_from`` may run within.

        Args:
            what: A module, with all below it, or one or several parameters or names.
            writeback_from: The rank whose changes in place become everybody's; masters take them over, of what was
                changed and nothing else. Other ranks may leave alone or change likewise what that rank changes.

        Raises:
            RuntimeError: On all ranks: something else was changed, and all changes of the block were undone. (At
                stage 3 a change through ``.data`` on other ranks is dropped without being seen.)

        Example:
            >>> import ds_zero
            >>> sharded = ds_zero.shard(torch.nn.Linear(2, 1), None, config=ds_zero.ZeroConfig(stage=3))
            >>> with sharded.access.gathered("bias", writeback_from=0), torch.no_grad():
            ...     _ = sharded.module.bias.fill_(2.0)
            >>> sharded.access.full_param("bias")
            tensor([2.])
        """
        if isinstance(what, nn.Module):
            params: Iterable[Param] = what.parameters()
        else:
            params = [what] if isinstance(what, (str, nn.Parameter)) else what
        places = [self._place(param) for param in params]
        targets = [Target(place.flat.params[place.number], place.flat, place.slot) for place in places]
        flats = {place.flat for place in places}
        units = [unit for unit in self._units if self._sharded and flats.intersection(unit.flats)]
        with whole_within(targets, units, self._residency, self._mesh, writeback_from):
            yield
        if writeback_from is not None:
            self._renewed()
            self._changed()

    # Helpers #

    def _place(self, param: Param) -> _Place:
        self._check()
        if isinstance(param, str):
            if param not in self._names:
                near = get_close_matches(param, self._names) or list(self._names)
                raise ValueError(f"the model has no parameter {param!r}; it has {shown(near)}")
            param = self._names[param]
        if param not in self._places:
            raise ValueError(f"a parameter of shape {list(param.shape)} is not one of the partitioned model's")
        return self._places[param]

    def _interval(self, place: _Place, vector: Tensor, first: int) -> Interval:
        return own_interval(place.flat.layout, place.slot, vector, first, self.comm.rank)

    def _whole(self, place: _Place, own: Interval) -> Tensor:
        return gathered(place.flat.layout, place.slot, own, self.comm).view(place.slot.shape)

    def _local_param(self, place: _Place) -> Interval:
        return self._interval(place, place.flat.master.detach(), place.flat.state_range[0])

    def _set_local(self, place: _Place, own: Interval, value: Tensor) -> None:
        held = f"this rank holds {own.data.numel()} elements of it"
        self._check_fits(place, value, fits=value.shape == own.data.shape, held=held)
        own.data.copy_(value.detach())

    def _check_whole(self, place: _Place, value: Tensor) -> None:
        held = f"it has shape {list(place.slot.shape)}"
        self._check_fits(place, value, fits=value.shape == place.slot.shape, held=held)
        if not same_on_all(value, self.comm, place.flat.master.device):
            raise ValueError(
                f"parameter {place.name!r}: the ranks got different values for the whole of it; nothing was changed. "
                "Pass the same value on all ranks, or each rank's part to set_local_..."
            )

    def _check_fits(self, place: _Place, value: Tensor, *, fits: bool, held: str) -> None:
        """Raise on all ranks if a value does not fit on one of them."""
        rows = agreed([fits], self.comm, place.flat.master.device)
        if not fits:
            raise ValueError(
                f"parameter {place.name!r}: {held}, got a value of shape {list(value.shape)}; nothing was changed"
            )
        if not all(row[0] for row in rows):
            raise ValueError(
                f"parameter {place.name!r}: another rank got a value of a shape that does not fit, and says so; "
                "nothing was changed"
            )

    def _renew(self, flat: Flat) -> None:
        """Derive from the master what depends on it."""
        refresh = flat.load_master()
        if refresh is not None:
            refresh.wait()
        self._renewed()
        self._changed()

    def _local_grad(self, place: _Place) -> Interval:
        if place.flat.gradient is None:
            raise ValueError(f"parameter {place.name!r} is not trained, so it has no gradient")
        return self._interval(place, place.flat.gradient.reduced(), place.flat.own[0])

    def _grad_factor(self, reduction: str) -> float:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is 'mean' or 'sum', got {reduction!r}")
        return 1.0 if reduction == "sum" else 1.0 / (max(self._num_micro_batches(), 1) * self.comm.size)

    def _grad_changed(self, place: _Place) -> None:
        if place.flat.gradient is not None:
            place.flat.gradient.forget_squares()
        self._changed()

    def _state_parts(self, place: _Place, key: str) -> Iterator[Interval]:
        """Yield what this rank holds of a tensor of optimizer state, replicas included."""
        held = {} if self._optimizer is None else self._optimizer.state
        for segment in place.flat.segments:
            value = held.get(segment.master, {}).get(key)
            if not isinstance(value, Tensor) or value.shape != segment.master.shape:
                continue
            begin = max(segment.start, place.slot.offset)
            end = min(segment.start + value.numel(), place.slot.end)
            if begin < end:
                yield Interval(begin - place.slot.offset, value[begin - segment.start : end - segment.start])

    def _local_state(self, place: _Place, key: str) -> Interval | None:
        """Return this rank's interval; None if the optimizer has no such tensor."""
        nothing = self._interval(place, place.flat.master.detach(), place.flat.state_range[0])
        for start, data in self._state_parts(place, key):
            return self._interval(place, data, place.slot.offset + start)
        return nothing if nothing.data.numel() == 0 else None

    def _checked_state(self, place: _Place, key: str) -> Interval:
        """Return this rank's interval, in float32; raise on all ranks if one has none."""
        own = self._local_state(place, key)
        present = [own is not None, own is not None and own.data.numel() > 0]
        rows = agreed(present, self.comm, place.flat.master.device)
        if own is None or not all(row[0] for row in rows) or not any(row[1] for row in rows):
            raise _no_state(place, key)
        return Interval(own.start, own.data.float())


def _no_state(place: _Place, key: str) -> KeyError:
    return KeyError(
        f"the optimizer holds no tensor {key!r} like parameter {place.name!r}: look at the names in its state "
        "(sharded.optimizer.state), which is empty before the first step; state of parameters that are stepped whole "
        "is with their owners only, and in checkpoints"
    )
