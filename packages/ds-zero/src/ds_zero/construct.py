"""What a model is partitioned from: its values, tensor by tensor, in memory or yet to be made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .agreement import Fingerprint, difference, number_of
from .deferred import DeferredTensor, cell_of, deferred, is_deferred, materialised
from .tape import evaluate, geometry_of, tensor_over
from .texts import shown

if TYPE_CHECKING:
    from ds_core.protocols import Collectives

    from .mesh import Mesh


def prepare(model: nn.Module, mesh: Mesh, device: torch.device) -> None:
    """Make sure that each parameter and buffer can be valued, and that all ranks will value them alike.

    Communicates 16 bytes, and 8 for each tensor where ranks differ. All ranks call it.

    Args:
        model: Parameters on the meta device become deferred, see :func:`record_resets`.
        mesh: The ranks.
        device: Where what stands on the meta device is made; the meta device itself: it stays there, without values.

    Raises:
        ValueError: A module on the meta device has no ``reset_parameters``; or a parameter that is yet to be made has
            hooks; or ranks differ in names, shapes or data types, or in how deferred tensors come about.
        RuntimeError: It is called within ``deferred()``.
    """
    if is_deferred(torch.empty(0)):
        raise RuntimeError("the model is partitioned within deferred(), where nothing has memory: leave it first")
    _check_no_hooks(model, device)
    if device.type == "meta":
        return
    if any(tensor.is_meta for tensor in _own_tensors(model)):
        record_resets(model, device)
    _check_ranks_agree(model, mesh)


def take(param: nn.Parameter, comm: Collectives) -> Tensor:
    """Return the values of ``param``, contiguous, the same on all ranks; all ranks call it, parameter by parameter.

    A parameter in memory is overwritten with rank 0's, at the cost of one broadcast. A deferred one is computed.
    """
    if is_deferred(param):
        return materialised(param).contiguous()
    values = param.detach().contiguous()
    comm.broadcast(values)
    return values


def settle(param: nn.Parameter, data: Tensor) -> None:
    """Let ``param`` be an ordinary parameter over ``data`` from now on: the same object, with its attributes."""
    _make_ordinary(param, data)
    param.data = data


def _make_ordinary(param: nn.Parameter, like: Tensor) -> None:
    if not is_deferred(param):
        return
    kind = nn.Parameter if isinstance(param, DeferredTensor) else type(param)
    # empty: over the data itself, writes to the data would count as writes to the parameter
    real = torch.Tensor._make_subclass(kind, like.new_empty(0), param.requires_grad)
    vars(real).update({name: value for name, value in vars(param).items() if name != "_is_param"})
    torch.utils.swap_tensors(param, real)


def _check_no_hooks(model: nn.Module, device: torch.device) -> None:
    names = [
        name
        for name, param in model.named_parameters()
        if is_deferred(param) or (param.is_meta and device.type != "meta")
        if param._backward_hooks or param._post_accumulate_grad_hooks
    ]
    if names:
        raise ValueError(
            f"parameters without values have hooks, which would be lost: {shown(names)}; register "
            "them after the model has been partitioned"
        )


def settle_rest(model: nn.Module) -> None:
    """Compute all deferred tensors that modules hold besides parameters: buffers, and tensors in plain attributes.

    Tensors that share memory go on to do so.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def computed(value: Any) -> Any:
        if not is_deferred(value):
            return value
        cell = cell_of(value)
        if cell._cdata not in storages:
            with torch.no_grad():
                storages[cell._cdata] = evaluate(cell.head, cell.nbytes(), cell.home)
        real = tensor_over(storages[cell._cdata], geometry_of(value))
        vars(real).update(vars(value))
        return known.setdefault(id(value), real)

    known: dict[int, Tensor] = {}  # by the object, which may be held in several places
    held: list[Any] = []  # so that none of them is freed, and its id given to another
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if any(is_deferred(leaf) for leaf in pytree.tree_leaves(value)):
                held.append(value)
                vars(module)[name] = pytree.tree_map(computed, value)


# Models on the meta device #


def record_resets(model: nn.Module, device: torch.device) -> None:
    """Make tensors on the meta device deferred ones on ``device``, as ``reset_parameters`` initialises them.

    Modules are reset in model order. Only those that hold a tensor on the meta device themselves are.

    Raises:
        ValueError: Such a module has no ``reset_parameters``, or that leaves one of its tensors as it is.
    """
    modules = [(name or "(root)", module) for name, module in model.named_modules() if any(_meta(module))]
    for name, module in modules:
        if not callable(getattr(module, "reset_parameters", None)):
            names = ", ".join(name for name, _ in _meta(module))
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) is on the meta device with {names} and has no "
                "reset_parameters() to initialise them: give it one, or build the model under ds_zero.deferred() "
                "instead of torch.device('meta')"
            )
    with deferred():
        replaced: dict[int, Tensor] = {}
        for _, module in modules:
            for name, tensor in list(_meta(module)):
                _replace(module, name, tensor, replaced, device)
        for _, module in modules:
            module.reset_parameters()
    for name, module in modules:
        for own, tensor in _own(module):
            if is_deferred(tensor) and cell_of(tensor).head.node is None and tensor.numel():
                raise ValueError(
                    f"reset_parameters() of module {name!r} ({type(module).__name__}) leaves {own!r} without values: "
                    "let it set all parameters and buffers, or build the model under ds_zero.deferred()"
                )


def _replace(module: nn.Module, name: str, tensor: Tensor, replaced: dict[int, Tensor], device: torch.device) -> None:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        if not is_deferred(tensor):  # it may be tied
            torch.utils.swap_tensors(tensor, nn.Parameter(empty, requires_grad=tensor.requires_grad))
    else:
        module._buffers[name] = replaced.setdefault(id(tensor), empty)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _meta(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in _own(module) if tensor.is_meta)


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


# Agreement of the ranks #


def _check_ranks_agree(model: nn.Module, mesh: Mesh) -> None:
    comm = mesh.everyone
    order = sorted(range(comm.size), key=partial(_rank_of, mesh=mesh))  # rows are in the order of shards
    device = next((tensor.device for tensor in _own_tensors(model)), torch.device("cpu"))
    found = difference([*_fingerprints(model)], lambda row: comm.gather_rows(row)[order], device)
    if found is None:
        return
    counts = "their numbers of parameters and buffers: " + ", ".join(map(str, found.counts))
    raise ValueError(
        f"the models of ranks {found.ranks} differ from rank 0's in {shown(map(repr, found.names)) or counts}. Build "
        "the same model on every rank; under deferred() that includes the random seed (torch.manual_seed before the "
        "block)"
    )


def _rank_of(index: int, mesh: Mesh) -> int:
    """Return the rank that holds shard ``index``, see [Note: Order of shards]."""
    within, node = divmod(index, mesh.across.size)
    return node * mesh.node.size + within


def _fingerprints(model: nn.Module) -> Iterator[Fingerprint]:
    """Yield name, shape, data type and, of deferred tensors, what the values depend on."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        text = f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
        recorded = cell_of(tensor).digest + repr(geometry_of(tensor)).encode() if is_deferred(tensor) else b""
        yield Fingerprint(name, number_of(text + recorded))
