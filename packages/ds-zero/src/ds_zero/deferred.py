"""Deferred construction: models whose initialisation is recorded, to be run tensor by tensor later.

[Note: Deferred construction]
Within ``with deferred():`` whatever makes a tensor makes a :class:`DeferredTensor`: its memory does not exist (torch
sees the meta device), and each operation on it is recorded (see [Note: Tape]), also after the block. Random operations
are run once at once, on memory that is freed again, which moves the generator on as eager construction would: seeds,
``fork_rng``, explicit generators and the state after the block are what they are without the block. The price is that
random values that matter are drawn twice. A number that is asked for (``.item()``, ``tolist()``, a condition) is
computed then and there from what it depends on. Tensors made elsewhere keep their data. Python sees the device that
the values will be on, since code asks it (``torch.ones(3, device=weight.device)``).

torch's ``trunc_normal_`` draws again until all values are within bounds, which asks for numbers in a loop. Within the
block it is recorded as one operation, or each round would compute all rounds before it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .tape import (
    Cell,
    Constant,
    Draw,
    Geometry,
    Head,
    Node,
    Ref,
    default_generator,
    evaluate,
    geometry_of,
    make_cell,
    tensor_over,
)

_OVERWRITING = (
    "normal_", "uniform_", "zero_", "fill_", "copy_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_",
    "bernoulli_", "trunc_normal_",
)  # fmt: skip
"""Operations in place that do not read what they overwrite."""

_SHAPE_ONLY = ("rand_like", "randn_like", "randint_like", "zeros_like", "ones_like", "full_like", "empty_like")
_EMPTY = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
_COPIES = ("clone", "_to_copy")
_REFUSED = ("resize_", "resize_as_", "set_", "_resize_output_")


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block, build a model without its memory; :func:`ds_zero.shard` gives each rank its part.

    Any ordinary code works, see [Note: Deferred construction]: default and own initialisation, tied parameters,
    buffers, views, ``.data``, conversion with ``half()`` or ``to()``, seeds. Sharding then computes one tensor after
    the other, on every rank, and keeps the rank's part: the same bits as without the block, and at no time more memory
    than the shards, and the largest tensor with what it is computed from. Time: random values that are kept are drawn
    twice. A subclass of ``nn.Parameter`` without its own ``__new__`` becomes an ordinary parameter; torch refuses one
    that makes its tensor itself, with a RuntimeError: build those modules outside the block.

    Raises:
        NotImplementedError: An operation cannot be recorded; the text names it.

    Example:
        >>> import ds_zero
        >>> with ds_zero.deferred():
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> ds_zero.shard(model, None).module[1].weight.shape
        torch.Size([1, 4])
    """
    with _Recording(), _whole_trunc_normal():
        yield


class DeferredTensor(Tensor):
    """A tensor whose values are recorded; made within :func:`deferred`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has torch's internal form
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record an operation."""
        del types
        return _perform(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute in torch's stub
        """Where the values will be."""
        return _cell(self).home

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]  # an attribute in torch's stub
        """Whether they will be on a GPU."""
        return _cell(self).home.type == "cuda"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]  # an attribute in torch's stub
        """Whether there will never be values."""
        return False

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write a part; torch itself would make a number into a tensor on the meta device, where it is lost."""
        super().__setitem__(index, value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype))

    def tolist(self) -> Any:
        """Compute the values."""
        return materialised(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Compute the values."""
        return materialised(self).numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the values."""
        return materialised(self).__array__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled without values."""
        raise RuntimeError(
            f"a deferred tensor of shape {list(self.shape)} has no data to save: shard the model, then save its state"
        )


class _Recording(TorchDispatchMode):
    """Makes factory functions return deferred tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return _perform(func, args, kwargs or {})


def is_deferred(value: object) -> bool:
    """Whether ``value`` is a deferred tensor; parameter classes of the user's keep their own type."""
    return isinstance(value, Tensor) and value.layout is torch.strided and isinstance(value.untyped_storage(), Cell)


def cell_of(tensor: Tensor) -> Cell:
    """Return the storage of a deferred tensor."""
    return _cell(tensor)


def materialised(tensor: Tensor) -> Tensor:
    """Compute the values of a deferred tensor; the result shares memory with nothing."""
    with _disable_current_modes(), torch.no_grad():
        cell = _cell(tensor)
        return tensor_over(evaluate(cell.head, cell.nbytes(), cell.home), geometry_of(tensor))


class _TruncNormal:
    """``trunc_normal_`` as one operation.

    Args:
        function: torch's.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

    def __repr__(self) -> str:
        return "trunc_normal_"

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not is_deferred(tensor):
            return self._function(tensor, *args, **kwargs)
        leaves, spec = pytree.tree_flatten(((tensor, *args), kwargs))
        call = _Call(self, "trunc_normal_", leaves, spec, [0], None)
        draw = _draw_of(call)
        with torch.no_grad():
            _drawn(call)
        torch.autograd.graph.increment_version(tensor)
        _cell(tensor).head = Head(Node(self, _arguments(call), spec, written=[0], made=[], draw=draw), 0)
        return tensor


@contextmanager
def _whole_trunc_normal() -> Iterator[None]:
    """Make torch's ``trunc_normal_`` one operation; where torch has none of this name, it is recorded in parts."""
    name = "_no_grad_trunc_normal_"
    function = vars(torch.nn.init).get(name)
    if function is None:
        yield
        return
    setattr(torch.nn.init, name, _TruncNormal(function))
    try:
        yield
    finally:
        setattr(torch.nn.init, name, function)


# Recording #


class _Call(NamedTuple):
    """An operation and its arguments, flattened."""

    func: Any
    name: str
    leaves: list[Any]
    spec: pytree.TreeSpec
    written: list[int]  # indices of leaves that are written in place
    device: torch.device | None  # argument of that name

    @property
    def home(self) -> torch.device:
        """Device of what the operation makes."""
        if self.device is not None:
            return self.device
        homes = [_cell(leaf).home for leaf in self.leaves if is_deferred(leaf)]
        return homes[0] if homes else torch.device("cpu")

    def with_leaves(self, leaves: Sequence[Any], **changes: object) -> Any:
        """Run the operation on other leaves, below Python."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch._C._DisableTorchDispatch():
            return self.func(*args, **{**kwargs, **changes})


def _perform(func: Any, args: Any, kwargs: Any) -> Any:
    """Record an operation on deferred tensors, or one that makes a tensor from nothing; run any other."""
    call = _flattened(func, args, kwargs)
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if is_deferred(tensor)]
    makes = any("Tensor" in str(result.type) for result in func._schema.returns)
    meta = call.device is not None and call.device.type == "meta"
    if not own and (tensors or not makes or meta):
        return func(*args, **kwargs)
    if call.name in _REFUSED:
        raise NotImplementedError(
            f"{call.name} of a deferred tensor of shape {list(own[0].shape)} cannot be recorded: make a tensor of the "
            "new size instead, or build this part of the model outside deferred()"
        )
    if meta:
        return call.with_leaves(call.leaves)
    into_data = any(not is_deferred(call.leaves[index]) for index in call.written)
    if into_data or not (makes or call.written):
        return _run_now(call)
    return _record(call)


def _flattened(func: Any, args: Any, kwargs: Any) -> _Call:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            changed = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            written += [i for i, leaf in enumerate(leaves) if any(leaf is one for one in changed)]
    device = kwargs.get("device")
    name = str(func._schema.name).rpartition("::")[2]
    return _Call(func, name, leaves, spec, written, None if device is None else torch.device(device))


def _run_now(call: _Call) -> Any:
    """Compute the deferred arguments and run the operation on them."""
    leaves = [materialised(leaf) if is_deferred(leaf) else leaf for leaf in call.leaves]
    with _disable_current_modes():
        return call.with_leaves(leaves)


def _record(call: _Call) -> Any:
    draw = _draw_of(call) if torch.Tag.nondeterministic_seeded in call.func.tags else None
    try:
        out = _without_values(call) if draw is None else _drawn(call)
    except (NotImplementedError, RuntimeError):
        if call.written:
            raise
        return _run_now(call)  # its shape depends on values, or it fails there with torch's own text
    outputs, spec = pytree.tree_flatten(out)
    made = [
        (index, geometry_of(leaf))
        for index, leaf in enumerate(outputs)
        if isinstance(leaf, Tensor) and not is_deferred(leaf)
    ]
    if not made and not call.written:  # views
        return pytree.tree_unflatten([_wrapped(leaf) for leaf in outputs], spec)
    if call.name in _EMPTY:
        heads = [Head(None, 0)]
    elif call.name in _COPIES and _shares(call, *made[0]):
        heads = [_cell(call.leaves[0]).head]
    else:
        node = Node(call.func, _arguments(call), call.spec, written=call.written, made=made, draw=draw)
        for slot, index in enumerate(call.written):
            _cell(call.leaves[index]).head = Head(node, slot)
        heads = [Head(node, len(call.written) + number) for number in range(len(made))]
    for (index, geometry), head in zip(made, heads, strict=True):
        outputs[index] = _new(outputs[index].untyped_storage().nbytes(), geometry, call.home, head)
    return pytree.tree_unflatten([_wrapped(leaf) for leaf in outputs], spec)


def _without_values(call: _Call) -> Any:
    """Run the operation on shapes."""
    leaves = [_shape_of(leaf) for leaf in call.leaves]
    changes: dict[str, object] = {}
    names = {argument.name for argument in call.func._schema.arguments}
    if call.device is not None or ("device" in names and not any(is_deferred(leaf) for leaf in call.leaves)):
        changes["device"] = torch.device("meta")
    if "pin_memory" in names:
        changes["pin_memory"] = None
    return _with_originals(call, leaves, call.with_leaves(leaves, **changes))


def _with_originals(call: _Call, leaves: Sequence[Any], out: Any) -> Any:
    """Put the arguments that were written in place of what stood in for them; take the data off the rest."""
    originals = {id(leaves[index]): call.leaves[index] for index in call.written}
    return pytree.tree_map(lambda leaf: originals.get(id(leaf), _shape_of(leaf, made=True)), out)


def _shape_of(leaf: Any, *, made: bool = False) -> Any:
    """Return ``leaf`` as torch's shape rules want it; tensors of one element may stand beside any device."""
    if is_deferred(leaf):
        return tensor_over(_cell(leaf), geometry_of(leaf))
    if not isinstance(leaf, Tensor) or leaf.is_meta or (leaf.dim() == 0 and not made):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _draw_of(call: _Call) -> Draw:
    given = [leaf for leaf in call.leaves if isinstance(leaf, torch.Generator)]
    generator = given[0] if given else default_generator(call.home)
    return Draw(generator.get_state(), generator.device, bool(given))


def _drawn(call: _Call) -> Any:
    """Run a random operation for the sake of its generator; return its result without data."""
    blind = call.written if call.name in _OVERWRITING else []
    leaves = [
        leaf if not is_deferred(leaf)
        else _scratch(leaf) if index in blind or call.name in _SHAPE_ONLY
        else materialised(leaf)
        for index, leaf in enumerate(call.leaves)
    ]  # fmt: skip
    with _disable_current_modes():
        out = call.with_leaves(leaves)
    return _with_originals(call, leaves, out)


def _scratch(tensor: Tensor) -> Tensor:
    with _disable_current_modes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_cell(tensor).home)


def _arguments(call: _Call) -> list[object]:
    """Return what a node keeps of the arguments."""
    cells = [_cell(leaf) if is_deferred(leaf) else None for leaf in call.leaves]
    kept: list[object] = []
    for index, (leaf, cell) in enumerate(zip(call.leaves, cells, strict=True)):
        if cell is not None:
            forgets = index in call.written and cells.count(cell) == 1 and _overwrites(call, index, leaf, cell)
            head = Head(None, 0) if forgets else cell.head
            kept.append(Ref(head, cell.nbytes(), cell.home, geometry_of(leaf)))
        else:
            kept.append(Constant(leaf) if isinstance(leaf, Tensor) else leaf)
    return kept


def _overwrites(call: _Call, index: int, tensor: Tensor, cell: Cell) -> bool:
    """Whether the operation writes every byte of ``cell`` without reading any."""
    if call.name not in _OVERWRITING or index != 0 or tensor.nbytes != cell.nbytes():
        return False
    covered = 1
    for step, size in sorted(
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if step != covered:
            return False
        covered *= size
    return True


def _shares(call: _Call, index: int, geometry: Geometry) -> bool:
    """Whether a copy may stay the same contents until one of the two is written: nothing about it differs."""
    source, cell = call.leaves[0], _cell(call.leaves[0])
    same = geometry_of(source) == geometry and source.nbytes == cell.nbytes()
    return index == 0 and same and call.home == cell.home


def _new(nbytes: int, geometry: Geometry, home: torch.device, head: Head) -> Tensor:
    return tensor_over(make_cell(nbytes, home, head), geometry)


def _wrapped(leaf: Any) -> Any:
    """Return a tensor over a cell as a deferred tensor."""
    if isinstance(leaf, DeferredTensor) or not is_deferred(leaf):
        return leaf
    return leaf if type(leaf) is not Tensor else torch.Tensor._make_subclass(DeferredTensor, leaf)


def _cell(tensor: Tensor) -> Cell:
    storage = tensor.untyped_storage()
    if not isinstance(storage, Cell):
        raise TypeError(f"a tensor of shape {list(tensor.shape)} on {tensor.device} is not deferred")
    return storage
