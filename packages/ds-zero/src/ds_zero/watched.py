"""Collectives whose waits are watched, and hooks that note where a rank is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .watch import Watch

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Handle


class WatchedHandle:
    """Plays the role ``Handle``."""

    __slots__ = ("_handle", "_wait", "_what")

    def __init__(self, handle: Handle, what: str, wait: Callable[[str, Callable[[], None]], None]) -> None:
        self._handle = handle
        self._what = what
        self._wait = wait

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written."""
        self._wait(self._what, self._handle.wait)


class WatchedCollectives:
    """Plays the role ``Collectives``; see [Note: Watch].

    Args:
        inner: Does the work.
        watch: Is told of waits.
        units: Names of the units, by key; filled once they are known.
        who: Which ranks these are, in words.
        blocks: Whether waits block the calling thread, as on CPU. Where they only order streams, the caller makes them.
    """

    def __init__(self, inner: Collectives, watch: Watch, units: Mapping[int, str], *, who: str, blocks: bool) -> None:
        self._inner = inner
        self._watch = watch
        self._units = units
        self._who = who
        self._wait = watch.blocking if blocks else watch.guarded
        self.rank = inner.rank
        self.size = inner.size
        weakref.finalize(self, watch.close)

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return memory of the inner collectives."""
        return self._inner.allocate(numel, like)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> WatchedHandle:
        """As the inner collectives do."""
        return self._started("all_gather", key, partial(self._inner.all_gather, out, shard, key=key))

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> WatchedHandle:
        """As the inner collectives do."""
        return self._started("reduce_scatter", key, partial(self._inner.reduce_scatter, out, full, key=key))

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> WatchedHandle:
        """As the inner collectives do."""
        return self._started("exchange", key, partial(self._inner.exchange, outgoing, incoming, key=key))

    def gather_rows(self, row: Tensor) -> Tensor:
        """As the inner collectives do."""
        self._watch.enter("step", "")
        gather: Callable[[], Tensor] = partial(self._inner.gather_rows, row)
        return self._watch.blocking(f"gather_rows over {self._who}", gather)

    def broadcast(self, tensor: Tensor) -> None:
        """As the inner collectives do."""
        self._watch.blocking(f"a broadcast of {tensor.numel()} elements", partial(self._inner.broadcast, tensor))

    def _started(self, op: str, key: int, start: Callable[[], Handle]) -> WatchedHandle:
        of = f" of unit {self._units[key]!r}" if key in self._units else ""
        what = f"{op}{of} over {self._who}"
        return WatchedHandle(self._watch.guarded(what, start), what, self._wait)


def note_places(model: nn.Module, modules: Mapping[nn.Module, str], watch: Watch) -> None:
    """Install hooks that tell ``watch`` which of ``modules``, by their unit's name, is being computed."""
    model.register_forward_pre_hook(partial(_on_micro_batch, watch), prepend=True)
    for module, unit in modules.items():
        module.register_forward_pre_hook(partial(_on_forward, watch, unit), prepend=True)
        module.register_forward_hook(partial(_on_output, watch, unit))


def _on_micro_batch(watch: Watch, module: nn.Module, _args: Any) -> None:
    if module.training and torch._C._current_graph_task_id() == -1:
        watch.next_micro_batch()


def _on_forward(watch: Watch, unit: str, _module: nn.Module, _args: Any) -> None:
    watch.enter("forward" if torch._C._current_graph_task_id() == -1 else "backward", unit)


def _on_output(watch: Watch, unit: str, _module: nn.Module, _args: Any, output: Any) -> None:
    if torch.is_grad_enabled():
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_on_gradient, watch, unit))


def _on_gradient(watch: Watch, unit: str, _grad: Tensor) -> None:
    watch.enter("backward", unit)
