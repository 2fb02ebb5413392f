"""A partitioned model: its step, its norm, its state, and the verbs a pipeline needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import model_state, state
from .access import Access, Calls
from .blocks import Blocks
from .gradient import GradNorm, NormTree
from .outside import OutsideReads
from .parking import Parking, states_of
from .passes import Hooks, Reducer, agree_over
from .placement import Placement
from .units import Phase, Residency, Unit
from .weights import Weights

if TYPE_CHECKING:
    from ds_core.protocols import BlockCall, StateSource, UpdateRule

    from .flat import Resources
    from .own import OwnGradients
    from .state import PartState, Piece
    from .whole import WholeTensors


_UNSENT = (
    "the last backward pass kept its gradients on this rank, so the sums lack them: the last backward pass of a step "
    "has to send (outside no_sync, or after set_sync(enabled=True)); or forget all gradients with drop_gradients()"
)


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
        own: OwnGradients,
        shared: Resources,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self._whole = whole
        self._own = own
        self._units = list(units)
        self._flats = [flat for unit in units for flat in unit.flats]
        self._trained = [flat for flat in self._flats if flat.gradient is not None]
        self._gradients = [flat.gradient for flat in self._flats if flat.gradient is not None]
        self._update = update
        self._shared = shared
        self._sharded = shared.placements.param is not Placement.REPLICATE
        self._residency = Residency()
        self._reducer = Reducer(units, self._end_pass, agree_over(shared.mesh.everyone, units))
        self._exchanges = own.exchanges
        self._reducer.keep = own.wanted
        self._norms = NormTree(self._trained, shared.mesh.everyone)
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
    def has_blocks(self) -> bool:
        """Whether a unit is a block, as :meth:`compile` and :meth:`wrap_blocks` need one."""
        return bool(self._blocks.modules)

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

        Communicates a few bytes per thousand gradient elements; all ranks call it. An upper bound where the
        optimizer takes each rank's own gradient, see [Note: Steps by own gradients].
        """
        if self._norm is None:
            scale = self._mean()
            self._norm = self._own.norm(scale) if self._reducer.keep else self._norms.measure(scale)
        return self._norm

    def step(self, scale: float = 1.0) -> None:
        """Update the parameters with the mean gradient times ``scale``; all ranks call it.

        Args:
            scale: For clipping or a loss scale.

        Raises:
            RuntimeError: There is no gradient, or no optimizer.
            FloatingPointError: The optimizer takes each rank's own gradient, and some rank's is not finite: nothing was
                changed.
        """
        if self.optimizer is None:
            raise RuntimeError("this model was sharded without an optimizer: there is nothing to step")
        factor = scale * self._mean()
        if self._reducer.keep:
            self._step_by_own(factor)
            return
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
        if self._exchanges:
            self._reducer.keep = self._own.wanted
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
        return model_state.export(
            self.module, self._flats, self.optimizer, self._whole, own=self._own, shared=self._shared
        )

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
            own=self._own,
            wire=self._shared.wire,
            strict=strict,
        )
        self._residency.drop_all()
        load()
        self._own.forget()
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
            + self._whole.nbytes
            + self._own.nbytes,
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
        # each rank's own gradient is the sum over its own micro-batches
        return 1.0 / (self.micro_batches * (1 if self._reducer.keep else self._shared.mesh.everyone.size))

    def _step_by_own(self, factor: float) -> None:
        norm = self.grad_norm()
        if norm.culprit is not None:
            raise FloatingPointError(
                f"the gradient of {norm.culprit} is not finite on some rank, and what its messages lack would never be "
                "again: leave the step out with drop_gradients()"
            )
        self._own.step(factor)
        self.drop_gradients()

    def _end_pass(self) -> None:
        self._residency.end_pass(Phase.BACKWARD)
        self._norm = None

    def _forget_derived(self) -> None:
        """Parameters or gradients were written from outside."""
        self._residency.drop_all()
        self._own.forget()
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
