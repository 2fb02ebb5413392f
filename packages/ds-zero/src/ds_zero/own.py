"""Steps by each rank's own gradient, for optimizers that exchange messages themselves.

[Note: Steps by own gradients]
Up to some step such an optimizer is stepped as usual. Then it says that it wants each rank's own gradient (see [Note:
Own gradients] in ds-core): backward passes send nothing, micro-batches add up in the leaf, which is kept to the step,
and the optimizer updates the whole buffers of weights, to the same bits on all ranks, so that nothing is gathered.
Parameters have to be whole on every rank from step to step, so this is for stages 0 to 2; what stage 2 saves of
gradients it saves as long as they are added. Under a lower compute data type the exact weights are kept whole, too.

The norm of the mean gradient would have to be measured on the mean. What is measured instead is the root mean square of
the norms of the ranks' own gradients, which is never less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import state
from .gradient import GradNorm
from .layout import Span

if TYPE_CHECKING:
    from ds_core.exchange_protocols import ExchangingOptimizer
    from ds_core.protocols import StateSource

    from .flat import Flat, Resources
    from .gradient import FlatGradient
    from .state import Piece

ROLE = "error"
"""Of what an optimizer has yet to send, in checkpoints."""


class OwnFlat:
    """Plays the role ``WholeFlat``.

    Args:
        flat: A trained one.
        gradient: Its gradient.
        shared: Communication.
    """

    def __init__(self, flat: Flat, gradient: FlatGradient, shared: Resources) -> None:
        self.key = flat.key
        self.numel = flat.layout.length
        self.device = flat.master.device
        self.parts: Sequence[Span] = list(flat.layout.spans(shared.per_tensor))
        self.gaps = list(flat.layout.gaps())
        self.shards: Sequence[tuple[int, nn.Parameter]] = [(each.start, each.master) for each in flat.segments]
        self.gradient = gradient.own
        self._flat = flat
        self._comm = shared.mesh.everyone
        is_low = flat.whole.dtype != torch.float32
        # 1D, whole; taken now, so that a run that does not fit ends at its start
        self._exact = torch.zeros_like(flat.whole, dtype=torch.float32) if is_low else flat.whole
        self._is_low = is_low
        self._is_known = not is_low  # whether the exact weights follow the shards

    def weights(self) -> Tensor:
        """Return the exact weights, whole; communicates if the shards were written from outside."""
        if not self._is_known:
            self._comm.all_gather(self._exact, self._flat.master, key=self.key).wait()
            self._is_known = True
        return self._exact

    def put_back(self) -> None:
        """Let this rank's shard and the compute parameters follow the exact weights."""
        if self._is_low:
            self._flat.master.copy_(self._exact[slice(*self._flat.own)])
            self._flat.whole.copy_(self._exact)

    def forget(self) -> None:
        """Take the shards for exact again."""
        self._is_known = not self._is_low

    @property
    def nbytes(self) -> int:
        """Bytes of exact weights besides the shards."""
        return self._exact.nbytes if self._is_low else 0


class OwnGradients:
    """See [Note: Steps by own gradients].

    Args:
        flats: The trained ones.
        optimizer: One that exchanges messages itself; None, where the optimizer does not: nothing is ever done.
        shared: Communication.
    """

    def __init__(self, flats: Sequence[Flat], optimizer: ExchangingOptimizer | None, shared: Resources) -> None:
        self._flats = flats
        self._optimizer = optimizer
        self.exchanges = optimizer is not None
        self._comm = shared.mesh.everyone
        self._kernels = shared.kernels
        self._whole: list[OwnFlat] = []
        if optimizer is not None:
            self._whole = [OwnFlat(flat, flat.gradient, shared) for flat in flats if flat.gradient is not None]
            optimizer.join(self._comm, self._whole)

    @property
    def wanted(self) -> bool:
        """Whether the next step is by own gradients."""
        return self._optimizer is not None and self._optimizer.wants_own

    def norm(self, scale: float) -> GradNorm:
        """Return the root mean square over ranks of the norm of their gradients times ``scale``; 8 bytes a flat."""
        leaves = [whole.gradient() for whole in self._whole]
        sums = [
            self._kernels.chunk_sumsq(leaf, flat.layout.granule).sum()
            for leaf, flat in zip(leaves, self._flats, strict=True)
        ]
        rows = self._comm.gather_rows(torch.stack(sums))
        squares = tuple(math.fsum(column) / self._comm.size for column in rows.t().tolist())
        total = math.fsum(squares)
        parts = tuple(flat.part for flat in self._flats)
        if math.isfinite(total):
            return GradNorm(math.sqrt(total) * scale, None, squares, parts, scale)
        bad = int(torch.nonzero(~rows.isfinite().all(0))[0])  # the first flat in which something is not finite
        return GradNorm(total, self._first_not_finite(self._flats[bad], leaves[bad]), squares, parts, scale)

    def step(self, scale: float) -> None:
        """Update all weights; all ranks call it, with finite gradients."""
        if self._optimizer is not None:
            self._optimizer.step_own(scale)

    def forget(self) -> None:
        """Say that weights or optimizer state were written from outside."""
        for whole in self._whole:
            whole.forget()
        if self._optimizer is not None:
            self._optimizer.forget_whole()

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's part of what is owed. All ranks call it, to the end."""
        owed = {} if self._optimizer is None else self._optimizer.owed()
        for flat in self._flats:
            if flat.key in owed:
                yield from state.interval_pieces(flat, ROLE, owed[flat.key], flat.own[0])

    def load(self, source: StateSource) -> None:
        """Owe what ``source`` says, and nothing else."""
        if self._optimizer is None:
            return
        held = source.shapes_of(ROLE) if ROLE in source.roles else {}
        owed = {}
        for flat in self._flats:
            owed[flat.key] = flat.master.new_zeros(flat.layout.shard_numel, dtype=torch.float32)
            for overlap in flat.layout.overlaps(*flat.own):
                if overlap.slot.name in held:
                    part = owed[flat.key][overlap.offset : overlap.offset + overlap.numel]
                    source.read(ROLE, overlap.slot.name, overlap.start, part)
        self._optimizer.load_owed(owed)

    @property
    def nbytes(self) -> int:
        """Bytes held for such steps besides weights, gradients and the tensors of the optimizer's state."""
        held = 0 if self._optimizer is None else self._optimizer.whole_bytes
        return held + sum(whole.nbytes for whole in self._whole)

    def _first_not_finite(self, flat: Flat, leaf: Tensor) -> str | None:
        """Name the first parameter that is not finite on some rank."""
        slots = flat.layout.slots
        own = [index for index, slot in enumerate(slots) if not bool(leaf[slot.offset : slot.end].isfinite().all())]
        first = torch.tensor([own[0] if own else len(slots)], device=leaf.device)
        return slots[int(self._comm.gather_rows(first).min())].name
