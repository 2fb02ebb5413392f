"""Forward and backward passes: the hooks of a model, and when each unit's gradient leaves.

[Note: Hooks]
Parameters: a gradient has been accumulated. Modules of sharded units: before forward, the unit becomes whole; after
forward, it may go, and each output tensor gets a hook that makes the unit whole again before its backward pass. The
unit may go a second time when its last gradient has arrived: no node of its backward pass can still read a weight
then, except a frozen one, so units with frozen parameters wait for the gradients of their inputs, too. So do, at first
and wherever the last pass had no gradient for some parameter, units of which autograd is asked how many will come.

[Note: Backward pass]
A pass opens with the first hook that fires and ends when autograd has finished, whoever called ``backward()``; each
pass in which a gradient arrives is one micro-batch (``torch.autograd.grad`` runs hooks, too, but writes none). The
model's outputs have a hook so that a pass opens in the graph of the caller's ``backward()``, not in one of those that
reentrant checkpointing runs within it. Every unit is reduced exactly once per pass on every rank; what has no gradient
counts as zero.

[Note: Order of reductions]
Units leave in one order on all ranks, each as soon as its last gradient and all units before it are there; what is
left at the end of the pass (unused parameters) leaves then. Ranks may therefore take different branches: one that waits
for a unit has sent all before it, so whoever has not sent that unit yet waits for nothing and will come to it. The
order is at first the reverse of the model's; after the first pass it is the one in which rank 0's gradients came. At
most two reductions are in flight while a third leaf is written, which bounds the memory of leaves and receive buffers
as long as gradients come in the order of reductions.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from .outside import OutsideReads, without_views
from .units import Phase, Presence, Residency, Unit, in_backward

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

_MAX_IN_FLIGHT = 2
_UNSEEN = (
    "parameter {!r} took part in a forward pass without being read from its module, so it was not whole and read as "
    "NaN: read it as an attribute of the module that holds it (module.weight) each time it is used"
)
_OPAQUE_OK = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Reducer:
    """See [Note: Backward pass].

    Args:
        units: All units, in the order of the model.
        on_end: Called when a pass is over.
        agree: Called on all ranks with the order in which gradients came, as indices; returns rank 0's.
    """

    def __init__(
        self, units: Sequence[Unit], on_end: Callable[[], None], agree: Callable[[list[int]], list[int]]
    ) -> None:
        self._units = [unit for unit in units if unit.num_trained]
        self._on_end = on_end
        self._agree = agree
        self._order = self._units[::-1]  # in which units leave
        self._is_agreed = False
        self._next = 0  # in the order
        self._complete: dict[Unit, None] = {}  # units all of whose gradients have come, in the order of their coming
        self._open = False
        self._arrived: Counter[Unit] = Counter()
        self._sent: set[Unit] = set()
        self._late: set[Unit] = set()  # had a gradient after they were sent; learned, they wait for the end
        self._in_flight: deque[Unit] = deque()
        self.sync = True
        self.keep = False  # whether gradients stay on this rank, in their leaves; see [Note: Steps by own gradients]
        self.num_passes = 0  # since the last reset
        self.unsent = False  # whether gradients of the last pass were kept on this rank
        self._partial = set(self._units)  # not known to have a gradient for each parameter
        self._expected: Counter[Unit] = Counter()  # gradients of partial units in this pass
        self._asked: set[tuple[Unit, int]] = set()  # in which graphs

    @property
    def is_open(self) -> bool:
        """Whether a pass has begun and not ended."""
        return self._open

    def open(self, _grad: Tensor | None = None) -> None:
        """Note that a backward pass is running; called by every hook that can come first, or as one."""
        if not self._open:
            self._open = True
            queue = cast(
                "Callable[[Callable[[], None]], None]", torch.autograd.Variable._execution_engine.queue_callback
            )
            queue(self._end)

    def arrive(self, unit: Unit, flat: int, param: int) -> bool:
        """Take one parameter gradient of ``unit``; True when all that is expected has come."""
        self.open()
        self._arrived[unit] += 1
        if self.keep:
            unit.accept(flat, param)
        elif self.sync and unit in self._sent:
            self._late.add(unit)
        elif self.sync:
            self._make_room()
            unit.accept(flat, param)
            if self._arrived[unit] == unit.num_trained and unit not in self._late:
                self._complete[unit] = None
                while self._next < len(self._order) and (following := self._order[self._next]) in self._complete:
                    self._next += 1
                    if following not in self._sent:
                        self.send(following)
        return self.is_complete(unit)

    def is_complete(self, unit: Unit) -> bool:
        """Whether all gradients of ``unit`` that this pass computes have come."""
        return self._arrived[unit] >= (self._expected[unit] if unit in self._partial else unit.num_trained)

    def is_partial(self, unit: Unit) -> bool:
        """Whether some parameters of ``unit`` may have no gradient: in the last pass they had none."""
        return unit in self._partial

    def expect(self, unit: Unit) -> None:
        """Ask autograd how many gradients of a partial unit the graph that is running computes."""
        graph = (unit, torch._C._current_graph_task_id())
        if graph not in self._asked:
            self._asked.add(graph)
            self._expected[unit] += _gradients_to_come([p for flat in unit.trained_flats for p in flat.params])

    def send(self, unit: Unit) -> None:
        """Start to reduce ``unit``."""
        self._make_room()
        unit.begin_reduce()
        self._in_flight.append(unit)
        self._sent.add(unit)

    def reset(self) -> None:
        """Forget an unfinished pass, and start to count passes anew."""
        self._finish_all()
        if self._open:
            self._on_end()
        self._close()
        self.num_passes = 0
        self.unsent = False

    def _end(self) -> None:
        self._finish_all()
        if self._arrived:
            sends = self.sync and not self.keep
            left = [unit for unit in self._order if unit not in self._sent or unit in self._late]
            for unit in left if sends else []:
                self.send(unit)
            self._finish_all()
            if sends and not self._is_agreed:
                self._learn_order()
            self._partial = {unit for unit in self._units if self._arrived[unit] < unit.num_trained}
            self.num_passes += 1
            self.unsent = not (self.sync or self.keep)
        self._close()
        self._on_end()

    def _learn_order(self) -> None:
        came = [unit for unit in self._complete if unit not in self._late]
        came += [unit for unit in self._order if unit not in came]
        index = {unit: i for i, unit in enumerate(self._units)}
        self._order = [self._units[i] for i in self._agree([index[unit] for unit in came])]
        self._is_agreed = True

    def _close(self) -> None:
        self._open = False
        self._next = 0
        for known in (self._arrived, self._expected, self._asked, self._sent, self._complete):
            known.clear()

    def _make_room(self) -> None:
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._in_flight.popleft().finish_reduce()

    def _finish_all(self) -> None:
        while self._in_flight:
            self._in_flight.popleft().finish_reduce()


def agree_over(comm: Collectives, units: Sequence[Unit]) -> Callable[[list[int]], list[int]]:
    """Return a function that returns the list that rank 0 called it with; all ranks call it."""

    def agree(order: list[int]) -> list[int]:
        device = units[0].flats[0].params[0].device
        # fake ranks have parameters without values, but an order
        shared = torch.tensor(order, device="cpu" if device.type == "meta" else device)
        comm.broadcast(shared)
        return [int(index) for index in shared.tolist()]

    return agree


class Hooks:
    """See [Note: Hooks].

    Args:
        residency: Brings sharded units in.
        reducer: Sends gradients.
        reads: Parameters read outside their unit.
    """

    def __init__(self, residency: Residency, reducer: Reducer, reads: OutsideReads) -> None:
        self._residency = residency
        self._reads = reads
        self._reducer = reducer
        self._waiting_for_inputs: set[Unit] = set()
        self._nodes: list[Node] = []  # that accumulate gradients; parameters alone do not keep them

    def install(self, unit: Unit, *, sharded: bool) -> None:
        """Install the hooks of ``unit``."""
        for flat_index, flat in enumerate(unit.trained_flats):
            for index, param in enumerate(flat.params):
                # a hook of the node comes after all hooks of the parameter, whenever its user added them
                node = get_gradient_edge(param).node
                node.register_hook(_weakly(self, unit, flat_index, index))
                self._nodes.append(node)
        if sharded:
            for module in unit.modules:
                module.register_forward_pre_hook(partial(self._before_forward, unit), with_kwargs=True, prepend=True)
                # always: a forward that raised does not use the unit any more, either
                module.register_forward_hook(partial(self._after_forward, unit), always_call=True)

    def guard(self, model: nn.Module) -> None:
        """Refuse a forward pass after a backward pass that was cut off; open passes in the caller's graph."""
        model.register_forward_pre_hook(self._check_last_pass, prepend=True)
        model.register_forward_hook(self._watch_outputs, always_call=True)

    # Forward #

    def _check_last_pass(self, _module: nn.Module, _args: Any) -> None:
        self._reads.depth += 1
        if self._reducer.is_open and not in_backward():
            raise RuntimeError(
                "the last backward pass did not finish (did it raise?), so some gradients of its micro-batch are "
                "summed and others are not: drop all gradients since the last step, on every rank, with "
                "drop_gradients() or the engine's zero_grad()"
            )

    def _watch_outputs(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # a hook that raised before ours had not counted the pass
        self._reads.depth = max(0, self._reads.depth - 1)
        if torch.is_grad_enabled() and not in_backward():
            for tensor in pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    tensor.register_hook(self._open_pass)

    def _open_pass(self, _grad: Tensor) -> None:
        if not self._reducer.is_open:
            self._residency.end_pass(Phase.FORWARD)
        self._reducer.open()

    def _before_forward(self, unit: Unit, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._residency.need(unit, Phase.BACKWARD if in_backward() else Phase.FORWARD)
        if (unit.has_frozen or self._reducer.is_partial(unit)) and torch.is_grad_enabled():
            inputs = [t for t in _tensors((args, kwargs), unit.name) if t.requires_grad]
            if inputs:
                self._waiting_for_inputs.add(unit)
                _when_all_have_gradients(inputs, partial(self._after_inputs, unit))

    def _after_forward(self, unit: Unit, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not in_backward():
            # within a backward pass this is a recomputation: the backward pass of the unit follows at once
            self._residency.idle(unit)
        tensors = list(_tensors(output, unit.name))
        for tensor in tensors:
            if tensor.layout is torch.strided and tensor.untyped_storage()._cdata in unit.memory:
                output = without_views(output, unit)
                tensors = list(_tensors(output, unit.name))
                break
        if torch.is_grad_enabled():
            before_backward = partial(self._before_backward, unit)
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(before_backward)
        return output

    # Backward #

    def _before_backward(self, unit: Unit, grad: Tensor) -> None:
        self._open_pass(grad)
        if self._reducer.is_partial(unit):
            self._reducer.expect(unit)
        self._residency.need(unit, Phase.BACKWARD)

    def after_gradient(self, unit: Unit, flat: int, param: int) -> None:
        """Note that one parameter of ``unit``, counted within one of its trained flats, has its gradient."""
        if unit.presence is not Presence.WHOLE and unit not in self._reads.seen:
            raise RuntimeError(_UNSEEN.format(unit.trained_flats[flat].layout.slots[param].name))
        if self._reducer.arrive(unit, flat, param) and unit not in self._waiting_for_inputs:
            self._residency.idle(unit)

    def _after_inputs(self, unit: Unit) -> None:
        self._waiting_for_inputs.discard(unit)
        if self._reducer.is_complete(unit):
            self._residency.idle(unit)


def _weakly(hooks: Hooks, unit: Unit, flat: int, param: int) -> Callable[[object, object], None]:
    """Return the hook of a parameter's gradient node; it keeps neither alive.

    The garbage collector does not see through these hooks (torch holds them in C++), so a strong reference would
    close a cycle, parameter to hook to unit to parameter, and no partitioned model would ever be freed.
    """
    hooks_ref, unit_ref = weakref.ref(hooks), weakref.ref(unit)

    def after_gradient(_inputs: object, _outputs: object) -> None:
        alive_hooks, alive_unit = hooks_ref(), unit_ref()
        if alive_hooks is not None and alive_unit is not None:
            alive_hooks.after_gradient(alive_unit, flat, param)

    return after_gradient


def _when_all_have_gradients(tensors: Sequence[Tensor], then: Callable[[], None]) -> None:
    """Call ``then`` once, when a backward pass has computed the gradients of all ``tensors``.

    torch's ``register_multi_grad_hook`` holds the graph from within the graph, which the garbage collector cannot see.
    """
    left = len(tensors)

    def count(_grad: Tensor) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            for handle in handles:
                handle.remove()  # an input may be a leaf, which outlives the graph
            then()

    handles = [tensor.register_hook(count) for tensor in tensors]


def _gradients_to_come(params: Sequence[nn.Parameter]) -> int:
    """Return how many gradients of ``params`` the graph that is running writes; more than all if that is unknown."""
    nodes = [get_gradient_edge(param).node for param in params]
    try:
        return sum(torch._C._will_engine_execute_node(node) for node in nodes)
    except RuntimeError:  # torch.autograd.grad, where the question is not supported
        return len(params) + 1


def _tensors(value: Any, unit: str) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts, registered pytrees and dataclasses."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name), unit)
        elif not isinstance(leaf, _OPAQUE_OK):
            raise NotImplementedError(
                f"unit {unit!r} takes or returns a {type(leaf).__qualname__}: tensors inside it cannot be found, and "
                "sharded parameters could be missing in the backward pass. Return tensors, tuples, lists, dicts or "
                "dataclasses, or register the type with torch.utils._pytree.register_pytree_node"
            )


def check_not_partitioned(model: nn.Module) -> None:
    """Refuse a model that is partitioned, or a part of which is.

    Raises:
        ValueError: It is.
    """
    for name, module in model.named_modules():
        if any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in module._forward_pre_hooks.values()):
            what = f"part {name!r} of this model" if name else "this model"
            raise ValueError(f"{what} is partitioned already: build the model anew, or use the Sharded that there is")
