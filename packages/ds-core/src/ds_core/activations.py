"""Activations recomputed in the backward pass, and where the inputs they are recomputed from wait until then.

[Note: Saved inputs]
``torch.utils.checkpoint`` (without reentrant autograd) runs a function, keeps only what it was called with, and runs
it again in the backward pass, with the state of the random number generators that it had. Of the arguments, the
*activations* (floating-point tensors that an operation made and that require a gradient) can be kept in another form,
through ``saved_tensors_hooks`` that are set around it:

- partitioned: all ranks of a model-parallel group have the same activation, so each keeps 1/N of its elements and
  they gather them before the recomputation;
- in host memory, which is pinned where the activation is on a GPU (on CPU an activation is in host memory already);
- contiguous: in rows of buffers that are allocated once and used again, so that what lives from forward to backward
  does not lie scattered between what lives for one operation.

Shape, strides and values are restored exactly, so results are equal bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .config.sections import ActivationCheckpointing

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class SavedBytes(NamedTuple):
    """Bytes of saved activations on this rank, without those kept as they are (no option set)."""

    now: int  # from a forward pass whose backward pass has not come
    peak: int  # most at once
    buffers: int  # of contiguous buffers, in use or not


class Checkpointer:
    """Runs functions so that their activations are recomputed in the backward pass; see [Note: Saved inputs].

    Memory from forward to backward, for an input of n elements of b bytes: ``n b``; partitioned over N ranks
    ``ceil(n / N) b``; in host memory 0 on the GPU. Communication: partitioned, one all-gather of ``n`` elements for
    each input in the backward pass. Time: one more forward pass.

    Args:
        settings: How saved inputs are kept; None: as they are.
        group: Ranks that call the same functions with the same activations, in the same order. None: this rank alone.

    Raises:
        ValueError: Activations are to be partitioned, but there is no group.

    Example:
        >>> run = Checkpointer(ActivationCheckpointing(contiguous_memory_optimization=True))
        >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        >>> x = torch.ones(2, 4, requires_grad=True) * 1.0
        >>> out = run(layer, x)
        >>> run.saved.now
        32
        >>> out.sum().backward()
        >>> run.saved.now
        0

    Reference:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174;
        partitioned: Rajbhandari et al., "ZeRO", SC 2020, section 6.1.
    """

    def __init__(self, settings: ActivationCheckpointing | None = None, group: dist.ProcessGroup | None = None) -> None:
        self._settings = settings = settings or ActivationCheckpointing()
        if settings.partition_activations and group is None:
            raise ValueError("partition_activations needs the group of ranks that have the same activations; got None")
        self._group = group if settings.partition_activations else None
        self._rank, self._size = (dist.get_rank(group), dist.get_world_size(group)) if self._group else (0, 1)
        self._rows = _Rows(settings.number_checkpoints) if settings.contiguous_memory_optimization else None
        self._now = 0
        self._peak = 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``; its backward pass runs it once more.

        Args:
            function: Gives the same result each time it is called with the same arguments and random numbers.
            args: Tensors may stand in nested tuples, lists and dicts.
            kwargs: Likewise.
        """
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        where = [index for index, leaf in enumerate(leaves) if _is_activation(leaf)]
        activations = [leaves[index] for index in where]
        for index in where:
            leaves[index] = None  # or the closure would keep them whole

        def run(*tensors: Tensor) -> Any:
            whole = list(leaves)
            for index, tensor in zip(where, tensors, strict=True):
                whole[index] = tensor
            inner_args, inner_kwargs = pytree.tree_unflatten(whole, spec)
            return self._run(function, inner_args, inner_kwargs)

        with nullcontext() if self._stay(activations) else saved_tensors_hooks(self._keep, _Saved.whole):
            return checkpoint(run, *activations, use_reentrant=False)

    @property
    def saved(self) -> SavedBytes:
        """What saved activations take."""
        return SavedBytes(self._now, self._peak, 0 if self._rows is None else self._rows.nbytes)

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._settings.synchronize_checkpoint_boundary:
            _synchronize()
        with _range() if self._settings.profile else nullcontext():
            output = function(*args, **kwargs)
        if self._settings.synchronize_checkpoint_boundary:
            _synchronize()
        return output

    def _stay(self, activations: Sequence[Tensor]) -> bool:
        """Whether activations are kept as they are, with torch's check that nobody writes to them."""
        away = self._settings.cpu_checkpointing and any(each.device.type != "cpu" for each in activations)
        return self._group is None and self._rows is None and not away

    def _keep(self, activation: Tensor) -> _Saved:
        whole = _unexpanded(activation)
        numel = -(-whole.numel() // self._size)  # the last rank's part may end in padding
        flat = whole.reshape(-1)[self._rank * numel : (self._rank + 1) * numel]
        device = torch.device("cpu") if self._settings.cpu_checkpointing else whole.device
        pinned = device.type == "cpu" and whole.device.type == "cuda"
        give_back = None
        if self._rows is not None:
            part, give_back = self._rows.take(numel, whole.dtype, device, pinned=pinned)
        else:
            part = torch.empty(numel, dtype=whole.dtype, device=device, pin_memory=pinned)
        part[: flat.numel()].copy_(flat, non_blocking=pinned)
        kept = _Saved(part, whole, activation.shape, self._group, self._size)
        self._now += part.nbytes
        self._peak = max(self._peak, self._now)
        weakref.finalize(kept, self._dropped, part.nbytes, give_back).atexit = False
        return kept

    def _dropped(self, nbytes: int, give_back: Callable[[], None] | None) -> None:
        self._now -= nbytes
        if give_back is not None:
            give_back()


class _Saved:
    """One saved activation.

    Args:
        part: 1D, this rank's elements in logical order, maybe followed by padding.
        whole: The activation, of which only shape, strides and device are remembered.
        expanded: The shape to expand it to.
        group: Over which it is partitioned.
        size: Ranks of the group.
    """

    def __init__(
        self, part: Tensor, whole: Tensor, expanded: torch.Size, group: dist.ProcessGroup | None, size: int
    ) -> None:
        self._part = part
        self._expanded = expanded
        self._shape, self._strides, self._device = whole.shape, whole.stride(), whole.device
        self._contiguous = whole.is_contiguous()
        self._group, self._size = group, size

    def whole(self) -> Tensor:
        """Return the activation; communicates where it is partitioned."""
        flat = self._part.to(self._device, non_blocking=True)
        if self._group is not None:
            parts, flat = flat, flat.new_empty(self._size * flat.numel())
            # torch 2.13 renamed it, and warns of the old name
            gather = vars(dist).get("all_gather_single", dist.all_gather_into_tensor)
            gather(flat, parts, group=self._group)
        dense = flat[: self._shape.numel()].view(self._shape)
        if self._contiguous:
            return dense.expand(self._expanded)
        # kernels choose by strides, and another kernel may round differently
        strided = torch.empty_strided(self._shape, self._strides, dtype=flat.dtype, device=flat.device)
        return strided.copy_(dense).expand(self._expanded)


class _Rows:
    """Buffers of so many rows each, for tensors of one length, data type and device."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        self.nbytes = 0  # of all buffers

    def take(
        self, numel: int, dtype: torch.dtype, device: torch.device, *, pinned: bool
    ) -> tuple[Tensor, Callable[[], None]]:
        """Return a row, and how to give it back."""
        free = self._free.setdefault((numel, dtype, device), [])
        if not free:
            rows = torch.empty(self._count, numel, dtype=dtype, device=device, pin_memory=pinned)
            self.nbytes += rows.nbytes
            free.extend(reversed(rows.unbind()))
        row = free.pop()
        return row, lambda: free.append(row)


def _is_activation(value: Any) -> bool:
    """Whether an argument is an activation: a mask or a parameter is kept by somebody else anyhow."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.grad_fn is not None


def _unexpanded(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without the repetitions of ``expand``, whose elements share memory."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _range() -> AbstractContextManager[Any]:
    again = torch._C._current_graph_task_id() != -1
    return record_function("ds.activations.recompute" if again else "ds.activations.forward")


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
