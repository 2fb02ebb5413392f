"""A partitioned model: its step, its norm, its state, and the verbs a pipeline needs.

[Note: Norm tree]
The squared norm of a buffer is a binary tree of float64 sums whose leaves are the sums of squares of blocks of
``LEAF`` consecutive elements. Block boundaries do not depend on where the buffer is cut into shards, so each rank
sums the subtrees that lie in its shard (``chunk_sumsq``), the few subtree roots are gathered, and the rest of the
tree is added the same way everywhere (:func:`tree_root`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import model_state, state
from .access import Access, Calls
from .blocks import Blocks
from .outside import OutsideReads
from .parking import Parking, states_of
from .passes import Hooks, Reducer, agree_over
from .placement import Placement
from .units import Phase, Residency, Unit
from .weights import Weights

if TYPE_CHECKING:
    from ds_core.protocols import BlockCall, StateSource, UpdateRule

    from .flat import Flat, Resources
    from .gradient import FlatGradient
    from .state import PartState, Piece
    from .whole import WholeTensors


_MAX_NORM_ROWS = 1 << 21
"""Subtree roots gathered at a time, 16 MB: those of 8.6e9 gradient elements. More only for a unit that has more."""


_UNSENT = (
    "the last backward pass kept its gradients on this rank, so the sums lack them: the last backward pass of a step "
    "has to send (outside no_sync, or after set_sync(enabled=True)); or forget all gradients with drop_gradients()"
)


class GradNorm(NamedTuple):
    """Norm of the mean gradient."""

    value: float  # L2, over all parameters; not finite when any gradient is not
    culprit: str | None  # first parameter whose gradient is not finite
    squares: tuple[float, ...] = ()  # of the sums of gradients, by part; with those of other models, one norm of all


class MemoryReport(NamedTuple):
    """What this rank holds, in bytes."""

    param: int
    """Parameters in the compute data type, held from step to step."""
    grad: int
    """Gradients, likewise."""
    state: int
    """Optimizer state, and float32 masters where parameters are not float32."""
    transient: int
    """Most bytes ever held by whole parameters and leaves on top of that."""
    peak_units: int
    """A number: most units whose sharded parameters were whole at once. Two, and the root's where it has parameters of
    its own, which stay whole from its forward pass on."""


class Sharded:
    """A model whose parameters, gradients and optimizer state are partitioned.

    Made by :func:`ds_zero.shard`. Call ``module`` for the forward pass and ``loss.backward()`` for the backward
    pass, once per micro-batch; then :meth:`step`.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer | None,
        *,
        update: UpdateRule,
        whole: WholeTensors,
        shared: Resources,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self._whole = whole
        self._units = list(units)
        self._flats = [flat for unit in units for flat in unit.flats]
        self._trained = [flat for flat in self._flats if flat.gradient is not None]
        self._gradients = [flat.gradient for flat in self._flats if flat.gradient is not None]
        self._update = update
        self._shared = shared
        self._sharded = shared.placements.param is not Placement.REPLICATE
        self._residency = Residency()
        self._reducer = Reducer(units, self._end_pass, agree_over(shared.mesh.everyone, units))
        self._norm_batches = _norm_batches(self._trained, shared.mesh.everyone.size)
        self._blocks = Blocks(units)
        self._norm: GradNorm | None = None  # of the gradients as they stand
        self.parking = Parking(module, lambda: states_of(self._flats, self.optimizer), self._release)
        self.access = Access(
            module,
            units,
            optimizer,
            residency=self._residency,
            shared=shared,
            calls=Calls(self.parking.check, lambda: self.micro_batches, self._forget_derived, whole.refresh),
        )
        self.weights = Weights(module, self.access)
        self._reads = OutsideReads(units, self._residency)
        hooks = Hooks(self._residency, self._reducer, self._reads)
        hooks.guard(module)
        for unit in units:
            hooks.install(unit, sharded=self._sharded)
        if self._sharded:
            self._reads.watch(module)

    # Before training #

    def compile(self, **settings: Any) -> None:
        """Compile each block of the model by itself, with the gathers and reductions outside of what is compiled.

        Blocks that are alike share one compiled graph. At stage 3 the parameters' memory changes from step to step,
        which is no reason to compile anew. A block that reads a parameter of a module outside all blocks is interrupted
        for it (an error under ``fullgraph``); a block must not read one of another block: pass such values in as
        arguments (see [Note: Reads from outside]).

        Args:
            settings: Of ``torch.compile``, such as ``backend`` and ``fullgraph``.

        Raises:
            ValueError: No unit is a block: see ``ZeroConfig.unit_classes``.
            RuntimeError: It is compiled already.

        Example:
            >>> from ds_zero import shard
            >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 1))
            >>> sharded = shard(model, lambda groups: torch.optim.AdamW(groups))
            >>> sharded.compile(backend="eager", fullgraph=True)
            >>> model(torch.ones(2, 4)).shape
            torch.Size([2, 1])
        """
        self._blocks.compile(**settings)
        if self._sharded:
            self._reads.watch_apart(self.module, self._blocks.modules)

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._blocks.is_compiled

    def wrap_blocks(self, call: BlockCall) -> None:
        """Run each block of the model as ``call(forward, *args, **kwargs)``, with no change to the model.

        Gathers and reductions stay outside: a recomputation finds the parameters whole, and at most two units are.

        Args:
            call: For instance ``functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)``, or a
                ``ds_core.Checkpointer``: activations of blocks are recomputed then.

        Raises:
            ValueError: No unit is a block: see ``ZeroConfig.unit_classes``.
            RuntimeError: They are wrapped already.
        """
        self._blocks.wrap(call)

    # Training #

    def set_sync(self, *, enabled: bool) -> None:
        """Whether a backward pass sends its gradients.

        Without, each rank adds its gradients up in ``param.grad``, whole and in the compute data type, and the next
        pass that does send carries them along: fewer messages, more memory, and another order of additions than
        [Note: Summation tree].
        """
        self._reducer.sync = enabled

    def grad_norm(self) -> GradNorm:
        """Return the norm of the mean gradient over all ranks and all micro-batches since the last step.

        Communicates a few bytes per thousand gradient elements; all ranks call it.
        """
        if self._norm is None:
            self._norm = self._measure_norm(self._mean())
        return self._norm

    def step(self, scale: float = 1.0) -> None:
        """Update the parameters with the mean gradient times ``scale``; all ranks call it.

        Args:
            scale: For clipping or a loss scale.

        Raises:
            RuntimeError: There is no gradient, or no optimizer.
        """
        if self.optimizer is None:
            raise RuntimeError("this model was sharded without an optimizer: there is nothing to step")
        factor = scale * self._mean()
        updates = [flat.updates() for flat in self._trained]
        done = self._update(self.optimizer, updates, factor)
        refreshes = [self._trained[index].begin_refresh() for index in done]
        for refresh in refreshes:
            if refresh is not None:
                refresh.wait()
        self._residency.drop_all()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget all gradients since the last step, and update nothing; all ranks call it."""
        self._reducer.reset()
        self._norm = None
        for flat in self._trained:
            for param in flat.params:
                param.grad = None  # of passes that did not send
        for gradient in self._gradients:
            gradient.clear()

    @property
    def micro_batches(self) -> int:
        """Backward passes on this rank since the last step."""
        return self._reducer.num_passes

    # Verbs of a pipeline #

    def unshard(self, part: nn.Module) -> None:
        """Make the parameters below ``part`` whole on every rank, through all passes until :meth:`reshard`.

        One gather serves all micro-batches in between. Memory: all parameters below ``part``.
        """
        self._residency.hold(self._sharded_units_below(part))

    def reshard(self, part: nn.Module) -> None:
        """Allow the parameters below ``part`` to be partitioned again."""
        self._residency.let_go(self._sharded_units_below(part))

    def reduce(self, part: nn.Module) -> None:
        """Send the gradients below ``part`` now, during a backward pass."""
        for unit in self._units_below(part):
            if unit.num_trained:
                self._reducer.send(unit)

    # State #

    def state(self) -> PartState:
        """Return live views of all state; see [Note: Pieces]."""
        self.parking.check()
        return model_state.export(self.module, self._flats, self.optimizer, self._whole, self._shared)

    def load_state(self, source: StateSource, *, optimizer: bool = True, strict: bool = True) -> None:
        """Replace parameters and buffers, and with ``optimizer`` its state, by those of ``source``.

        Nothing is changed before all of it has been found to fit.

        Args:
            source: What to read from.
            optimizer: Whether to load the optimizer's state and settings.
            strict: Whether a tensor that ``source`` lacks is an error; without, it stays as it is.

        Raises:
            ValueError: A tensor is missing or has another shape, or the optimizer is another one.
        """
        self.parking.check()
        load = model_state.prepare_load(
            self.module,
            self._flats,
            self.optimizer if optimizer else None,
            self._whole,
            source,
            wire=self._shared.wire,
            strict=strict,
        )
        self._residency.drop_all()
        load()
        self.drop_gradients()

    def gradients(self) -> Iterator[Piece]:
        """Yield this rank's pieces of the gradient *sums* since the last step."""
        for flat in self._trained:
            yield from state.grad_pieces(flat)

    def memory(self) -> MemoryReport:
        """Return what this rank holds."""
        held = [] if self.optimizer is None else self.optimizer.state.values()
        tensors = [value for entry in held for value in entry.values() if torch.is_tensor(value)]
        return MemoryReport(
            param=sum(flat.param_bytes for flat in self._flats),
            grad=sum(gradient.nbytes for gradient in self._gradients),
            state=sum(t.nbytes for t in tensors)
            + sum(flat.master_bytes for flat in self._trained)
            + self._whole.nbytes,
            transient=self._shared.param_pool.peak_bytes + self._shared.grad_pool.peak_bytes,
            peak_units=self._residency.peak_units,
        )

    # Helpers #

    def _mean(self) -> float:
        if self.parking.away:
            self.parking.check()
        if not self._trained:
            raise RuntimeError(
                "no parameter of this model is trained: it was sharded without an optimizer, or none of the parameters "
                "given to the optimizer requires a gradient"
            )
        if self.micro_batches == 0:
            raise RuntimeError("no backward pass since the last step: call loss.backward() first")
        if self._reducer.unsent:
            raise RuntimeError(_UNSENT)
        return 1.0 / (self.micro_batches * self._shared.mesh.everyone.size)

    def _measure_norm(self, scale: float) -> GradNorm:
        """Return the L2 norm of ``scale`` times the sums; small messages (see [Note: Norm tree]).

        They take 8 bytes for each 64 to 4,096 gradient elements.
        """
        roots: list[float] = []
        for batch in self._norm_batches:
            rows = [gradient.squares() for gradient in batch]
            gathered = self._shared.mesh.everyone.gather_rows(torch.cat(rows))
            roots += tree_root(_padded(_in_layout_order(gathered, [row.numel() for row in rows]))).tolist()
        total = math.fsum(roots)
        if math.isfinite(total):
            return GradNorm(math.sqrt(total) * scale, None, tuple(roots))
        return GradNorm(total, self._first_not_finite(roots), tuple(roots))

    def _first_not_finite(self, roots: Sequence[float]) -> str | None:
        """Name the parameter, from the squared norm of each flat, which all ranks have; communicates."""
        for flat, gradient, root in zip(self._trained, self._gradients, roots, strict=True):
            if not math.isfinite(root):
                chunks = self._shared.mesh.everyone.gather_rows(gradient.squares()).reshape(-1)
                start = int(torch.nonzero(~torch.isfinite(chunks))[0]) * flat.layout.granule
                names = [overlap.slot.name for overlap in flat.layout.overlaps(start, start + flat.layout.granule)]
                return " or ".join(names)
        return None

    def _end_pass(self) -> None:
        self._residency.end_pass(Phase.BACKWARD)
        self._norm = None

    def _forget_derived(self) -> None:
        """Parameters or gradients were written from outside."""
        self._residency.drop_all()
        self._norm = None

    def _release(self) -> None:
        self._residency.drop_all()
        self._shared.param_pool.trim()
        self._shared.grad_pool.trim()

    def _sharded_units_below(self, part: nn.Module) -> list[Unit]:
        return self._units_below(part) if self._sharded else []

    def _units_below(self, part: nn.Module) -> list[Unit]:
        below = set(part.modules())
        return [unit for unit in self._units if below.intersection(unit.modules)]


def _in_layout_order(gathered: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Split ``[ranks, sum(widths)]`` into one vector per flat, ordered by position in the flat."""
    return [columns.reshape(-1) for columns in gathered.split(list(widths), dim=1)]


def _padded(chunks: Sequence[Tensor]) -> Tensor:
    """Stack vectors into rows of one power-of-two width; zeros at the end change no tree."""
    width = 1 << (max(chunk.numel() for chunk in chunks) - 1).bit_length()
    rows = chunks[0].new_zeros(len(chunks), width)
    for row, chunk in zip(rows, chunks, strict=True):
        row[: chunk.numel()] = chunk
    return rows


def _norm_batches(flats: Sequence[Flat], num_ranks: int) -> list[list[FlatGradient]]:
    """Group the flats so that no message of the norm grows with the model: one on most models."""
    batches: list[list[FlatGradient]] = []
    width = 0  # of the widest flat in the last batch
    for flat in flats:
        if flat.gradient is not None:
            rows = num_ranks * (flat.layout.shard_numel // flat.layout.granule)
            width = max(width, rows)
            if not batches or (len(batches[-1]) + 1) * width > _MAX_NORM_ROWS:
                batches.append([])
                width = rows
            batches[-1].append(flat.gradient)
    return batches


def tree_root(rows: Tensor) -> Tensor:
    """Add each row of ``rows`` ([n, 2**k], float64) along a binary tree; zeros behind the data change nothing.

    Example:
        >>> tree_root(torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64))
        tensor([6.], dtype=torch.float64)
    """
    while rows.shape[1] > 1:
        rows = rows[:, ::2] + rows[:, 1::2]
    return rows[:, 0]
