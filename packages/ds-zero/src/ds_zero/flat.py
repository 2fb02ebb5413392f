"""One flat buffer: the parameters of one data type that communicate together.

[Note: Buffers of a flat]
=========  =====  =============  ==========================================================================
name       shape  data type      what it is
=========  =====  =============  ==========================================================================
whole      [L]    compute        the parameters, as views, whenever they are whole; pooled memory if sharded
kept       [K]    compute        the interval of it that is kept from step to step; ``whole`` itself if that is all
shard      [S]    compute        the interval of optimizer state, a view of ``kept``
master     [S]    float32        what the optimizer updates; ``shard`` itself if that is float32 already, unless it is
                                 rounded on the wire
leaf       [L]    compute        the gradient of one backward pass; pooled memory unless it is kept to the step
reduced    [S]    gradient       sum over ranks and accumulation steps (see [Note: Summation tree]); this rank's
                                 interval of ``leaf`` where placement and data types allow it
=========  =====  =============  ==========================================================================

L elements in all; how many K and S are is the placement's business (see [Note: Two axes]): L, one node's part or one
rank's. ``reduced`` is summed in the shard of one rank among all, and gathered before the step if S is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .construct import settle, take
from .gradient import FlatGradient
from .layout import Layout, Slot
from .mesh import Mesh
from .placement import Placement, Placements

if TYPE_CHECKING:
    from ds_core.kernel_protocols import ShardKernels
    from ds_core.protocols import Handle


_NBYTES = torch.UntypedStorage.nbytes


class StoragePool:
    """Lends memory to storages that are empty the rest of the time.

    A parameter's views, and the views autograd saved of it, keep pointing at one storage *object*; leasing puts
    memory behind that object, releasing takes it away. The memory itself stays allocated and goes to the next
    taker: returning it to the allocator at every release costs a page fault for each 4 KiB of a large buffer on
    CPU (40 MB: 19 ms, against 2 ms to fill it).

    Args:
        allocate: Returns 1D memory of so many elements like those of a tensor; None: torch's own.

    torch before 2.13 cannot exchange the memory of two storages; there each lease is an allocation.

    Example:
        >>> view = torch.empty(4)
        >>> pool, storage = StoragePool(), view.untyped_storage()
        >>> _ = storage.resize_(0)
        >>> pool.lease(storage, 16)
        >>> view.fill_(1.0).sum().item()
        4.0
        >>> pool.release(storage)
        >>> storage.nbytes(), pool.nbytes
        (0, 16)
    """

    def __init__(self, allocate: Callable[[int, Tensor], Tensor] | None = None) -> None:
        self._allocate = allocate or (lambda numel, like: like.new_empty(numel))
        self._exchanges = "_swap_data_ptr_" in dir(torch.UntypedStorage)
        self._free: list[torch.UntypedStorage] = []
        self._leased_bytes = 0
        self._peak_bytes = 0

    def lease(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Put at least ``nbytes`` behind ``storage``, which must be empty; contents are arbitrary."""
        if self._exchanges:
            storage._swap_data_ptr_(self._take(nbytes, storage.device))  # type: ignore[attr-defined]  # torch's stubs
        else:
            storage.resize_(nbytes)
        self._leased_bytes += storage.nbytes()
        self._peak_bytes = max(self._peak_bytes, self._leased_bytes + sum(map(_NBYTES, self._free)))

    def release(self, storage: torch.UntypedStorage) -> None:
        """Take the memory back; ``storage`` is empty afterwards, and reading a view of it is an access violation."""
        self._leased_bytes -= storage.nbytes()
        if self._exchanges:
            memory = torch.UntypedStorage(0, device=storage.device)
            memory._swap_data_ptr_(storage)  # type: ignore[attr-defined]
            self._free.append(memory)
        else:
            storage.resize_(0)

    def trim(self) -> None:
        """Give free memory back to the allocator."""
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now, leased or free."""
        return self._leased_bytes + sum(map(_NBYTES, self._free))

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever held."""
        return self._peak_bytes

    def _take(self, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        fitting = [free for free in self._free if free.nbytes() >= nbytes]
        if not fitting:
            # what is too small for this taker would only be held in vain beside the new memory
            self._free.clear()
            byte = torch.empty(0, dtype=torch.uint8, device=device)
            return self._allocate(nbytes, byte).untyped_storage()
        memory = min(fitting, key=_NBYTES)
        self._free.remove(memory)
        return memory


class Resources(NamedTuple):
    """What the flats of one model share."""

    mesh: Mesh
    kernels: ShardKernels
    param_pool: StoragePool  # memory of whole parameters
    grad_pool: StoragePool  # memory of leaves
    placements: Placements
    gradient_dtype: torch.dtype
    per_tensor: frozenset[int]  # parameter groups whose tensors are segments of their own
    wire: Mesh  # what trained weights are gathered and their gradients reduced over; ``mesh``, unless it compresses
    rounds_weights: bool  # whether weights are rounded on the wire


class Segment(NamedTuple):
    """The part of one optimizer parameter group, or of one tensor of it, that lies in one flat, on this rank."""

    group: int
    start: int  # first element, in the coordinates of the layout
    master: nn.Parameter  # 1D
    copy: Tensor | None  # 1D, the compute parameters to refresh where they are not the master


class Update(NamedTuple):
    """A segment and its gradient; plays the role ``ShardUpdate``."""

    master: nn.Parameter
    grad: Tensor
    copy: Tensor | None


class Flat:
    """See [Note: Buffers of a flat].

    Construction takes the values of ``params`` over, one after the other (see :func:`~ds_zero.construct.take`), and
    makes them views of the buffer: the memory that a parameter had before is free when the next one is taken.

    Args:
        layout: Where each parameter stands.
        params: The parameters, in the order of ``layout.slots``.
        dtype: Data type of forward and backward.
        trained: Whether the optimizer updates them; frozen parameters have neither gradient nor master.
        part: What ``Parts.separate`` says of all of them.
        key: Number that names the buffer in communication, the same on every rank.
        shared: Communication, memory and placements.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[nn.Parameter],
        *,
        dtype: torch.dtype,
        trained: bool,
        key: int,
        shared: Resources,
        part: int | None = None,
    ) -> None:
        self.layout = layout
        self.part = part
        self.params = list(params)
        mesh, param = shared.mesh, shared.placements.param
        state = shared.placements.state if trained else Placement.SHARD
        self.own = layout.shard_of(mesh.everyone.rank)
        self.state_range = mesh.range_of(state, layout)
        self.key = key
        self._shared = shared
        self._sharded = param is not Placement.REPLICATE
        wire = shared.wire if trained else mesh
        self._gather = wire.between(param, Placement.REPLICATE)
        self._refresh = None if state is param else wire.between(state, param)
        # a gather in place leaves rounded weights in the shard, so the exact ones live elsewhere
        self._apart = trained and shared.rounds_weights and self._refresh is not None
        like = torch.empty(0, dtype=dtype, device=self.params[0].device)
        # sharded, it is empty until it is gathered for the first time
        self._whole = like.new_empty(layout.length) if self._sharded else self._sendable(layout.length, like)  # 1D
        self._whole_bytes = self._whole.nbytes
        first, last = mesh.range_of(param, layout)
        self._kept_from = first
        self._kept = self._sendable(last - first, like) if self._sharded else self._whole  # 1D
        self.shard = self._kept[self.state_range[0] - first : self.state_range[1] - first]  # 1D
        self._views = [self._whole[slot.offset : slot.end].view(slot.shape) for slot in layout.slots]
        self._absent = [_absent(view) for view in self._views]
        if self._sharded:
            self._whole.untyped_storage().resize_(0)
        self.master = self._make_master(torch.float32 if trained else dtype)  # 1D, over state_range
        self._take_values()
        self.segments = self._make_segments() if trained else []
        self._versions: list[int] = []  # of the parameters when they were detached
        self.gradient = FlatGradient(layout, self.params, key=key, shared=shared) if trained else None
        if self._sharded:
            self.detach()

    # Parameters #

    def begin_gather(self) -> Handle:
        """Lease memory for the whole parameters and ask for the other ranks' shards."""
        self._shared.param_pool.lease(self._whole.untyped_storage(), self._whole_bytes)
        return self._gather.all_gather(self._whole, self._kept, key=self.key)

    def attach(self) -> None:
        """Point the parameters at the whole buffer.

        Raises:
            RuntimeError: A parameter was written in place while it was not whole, and the values would be lost.
        """
        for slot, param, version in zip(self.layout.slots, self.params, self._versions):
            if param._version != version:
                raise RuntimeError(
                    f"parameter {slot.name!r} was changed in place while it was sharded, so the change is lost: "
                    "change it before the model is sharded, or load a state"
                )
        for param, view in zip(self.params, self._views, strict=True):
            param.data = view

    def detach(self) -> None:
        """Point the parameters at placeholders of the same shape, all NaN.

        A parameter that is read while it is not whole shows up as NaN then, not as an access violation, and
        one that is written is noticed by :meth:`attach`.
        """
        for param, absent in zip(self.params, self._absent, strict=True):
            param.data = absent
        self._versions = [param._version for param in self.params]

    def release(self) -> None:
        """Give the memory of the whole parameters back; they must be detached."""
        self._shared.param_pool.release(self._whole.untyped_storage())

    # Optimizer step #

    def updates(self) -> list[Update]:
        """Return the segments with their reduced gradients."""
        if self.gradient is None:
            return []
        grad, first = self.gradient.for_optimizer(), self.state_range[0]
        updates = []
        for segment in self.segments:
            start = segment.start - first
            updates.append(Update(segment.master, grad[start : start + segment.master.numel()], segment.copy))
        return updates

    def begin_refresh(self) -> Handle | None:
        """Bring replicated parameters up to date after their shards were updated; None: they are."""
        if self._refresh is None:
            return None
        if self._apart and self.shard.dtype == self.master.dtype:
            self.shard.copy_(self.master)  # in a lower precision the step has done that
        return self._refresh.all_gather(self._kept, self.shard, key=self.key)

    def load_master(self) -> Handle | None:
        """Derive everything else from ``master``, which was written from outside."""
        if self.shard.dtype != self.master.dtype:
            self.shard.copy_(self.master)
        return self.begin_refresh()

    def keep(self, slot: Slot, values: Tensor) -> None:
        """Take over what this rank keeps of a parameter's ``values`` (1D)."""
        for own, part in self._parts(slot, values):
            own.copy_(part)

    def keep_changed(self, slot: Slot, values: Tensor) -> None:
        """Take over a parameter's ``values`` (1D, compute data type); masters that round to theirs stay as they are."""
        for own, part in self._parts(slot, values):
            # 16 bits at most where there are masters besides
            own.copy_(part if own.dtype == part.dtype else torch.where(_same_bits(own.to(part.dtype), part), own, part))

    def _parts(self, slot: Slot, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what this rank keeps of a parameter, compute values and masters, each with that part of ``values``."""
        for target, first in ((self._kept, self._kept_from), (self.master, self.state_range[0])):
            start, end = max(first, slot.offset), min(first + target.numel(), slot.end)
            if start < end:
                yield target[start - first : end - first], values[start - slot.offset : end - slot.offset]

    # Properties #

    @property
    def kept(self) -> Tensor:
        """1D, the compute parameters that are kept from step to step."""
        return self._kept

    @property
    def whole(self) -> Tensor:
        """1D, all elements; readable only while the parameters are whole."""
        return self._whole

    @property
    def param_bytes(self) -> int:
        """Bytes of compute parameters held from step to step, without pooled memory."""
        return self._kept.nbytes

    @property
    def master_bytes(self) -> int:
        """Bytes of the master where it is not the compute parameters themselves."""
        return 0 if self.master is self.shard else self.master.nbytes

    # Construction #

    def _sendable(self, numel: int, like: Tensor) -> Tensor:
        return self._shared.mesh.everyone.allocate(numel, like).zero_()

    def _make_master(self, exact: torch.dtype) -> Tensor:
        """Return the tensor over ``state_range`` that will hold the exact values of the parameters."""
        if exact == self.shard.dtype and not self._apart:
            return self.shard
        return self.shard.new_zeros(self.shard.numel(), dtype=exact)

    def _take_values(self) -> None:
        """Fill what this rank keeps, and forget the rest of each parameter."""
        for slot, param, view in zip(self.layout.slots, self.params, self._views, strict=True):
            self.keep(slot, take(param, self._shared.mesh.everyone).view(-1))
            settle(param, view)

    def _make_segments(self) -> list[Segment]:
        first, last = self.state_range
        separate = self.master.dtype != self.shard.dtype
        segments = []
        for span in self.layout.spans(self._shared.per_tensor):
            start, end = max(first, span.start), min(last, span.end)
            if start < end:
                part = slice(start - first, end - first)
                master = nn.Parameter(self.master[part], requires_grad=True)
                segments.append(Segment(span.group, start, master, self.shard[part] if separate else None))
        return segments


def _absent(view: Tensor) -> Tensor:
    """Return a tensor like ``view`` that reads as NaN and takes the memory of one element."""
    poison = torch.nan if view.is_floating_point() else 0
    return view.new_full((), poison).expand(view.shape)


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    return a.view(torch.int16) == b.view(torch.int16)
