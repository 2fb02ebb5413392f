"""A part of a model that is there: the layers of one stage, as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .handing import Handed
from .keyed import Key, draw_from, kept_generators
from .layers import Modules
from .noting import note


class Borrowed(NamedTuple):
    """A parameter that a step runs with, and does not have."""

    skip: str  # under which it comes
    module: nn.Module
    attribute: str


class Step(NamedTuple):
    """One layer of a part."""

    layer: int  # its index in the whole model
    title: str  # what errors call it
    run: Callable[[Modules, Any], Any]
    paths: Sequence[str]  # of its modules in the part, where they are looked up: whoever replaces one is heard
    foreign: Modules  # modules of another part; else none
    borrowed: Sequence[Borrowed]
    stashes: str
    pops: str


class Part(nn.Sequential):
    """The layers of one stage, made by ``PipelineModule.build``.

    Maps what the stage before hands on to what this one hands on; the first one, the micro-batch. A part that borrows
    weights is given them with each forward pass: ``part(value, skips={name: weight})``, for the ``loans`` to its stage;
    so is one with a ``Pop`` whose ``Stash`` is in another part, and the part with that Stash returns ``Handed``.

    [Note: Recomputed layers]
    A group of layers that is recomputed keeps its input, and runs again when the backward pass needs what is within:
    with the random numbers it had. Where a schedule computes weight gradients later, it does so here, too, and what is
    recomputed for them stays until then.
    """

    def __init__(
        self,
        modules: Modules,
        steps: Sequence[Step],
        interval: int,
    ) -> None:
        super().__init__()
        for path, module in modules.items():
            _attach(self, path.split("."), module)
        size = interval or len(steps)
        self._groups = [steps[start : start + size] for start in range(0, len(steps), size)]
        self._recomputes = interval > 0
        self._borrows = {borrowed.skip for step in steps for borrowed in step.borrowed}
        self._takes = self._borrows | {step.pops for step in steps if step.pops} - {step.stashes for step in steps}
        self._key: Key | None = None

    @contextmanager
    def keyed(self, seed: int, micro_batch: int) -> Iterator[None]:
        """Within the block, let each layer draw random numbers that depend on this and its index; see [Note: Keys].

        Args:
            seed: Of the run.
            micro_batch: Its number, in the whole run.

        Example:
            >>> from .model import PipelineModule
            >>> model = PipelineModule([nn.Dropout(), nn.Dropout()])
            >>> with (whole := model.build(0, 2)).keyed(seed=5, micro_batch=0):
            ...     want = whole(torch.ones(9))
            >>> value = torch.ones(9)
            >>> for part in (model.build(0, 1), model.build(1, 2)):
            ...     with part.keyed(seed=5, micro_batch=0):
            ...         value = part(value)
            >>> torch.equal(value, want)
            True
        """
        before, self._key = self._key, Key(seed, micro_batch)
        try:
            yield
        finally:
            self._key = before

    def forward(self, value: Any, *, skips: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Run the layers on one value; see ``PipelineModule``.

        Raises:
            ValueError: Other skips than it takes.
        """
        if skips.keys() != self._takes:
            raise ValueError(f"the part takes the skips {sorted(self._takes)}; got {sorted(skips)}")
        key = self._key
        # views are no leaves: DeferredWeights leaves such weights alone, whose gradient has to leave with the input's
        lent = {name: skips[name].view_as(skips[name]) for name in self._borrows}
        stashed = {name: skip for name, skip in skips.items() if name not in self._borrows}
        for group in self._groups:
            if self._recomputes and torch.is_grad_enabled():
                value, stashed = checkpoint(
                    self._run, group, value, key, lent, stashed,
                    use_reentrant=False, preserve_rng_state=key is None,
                )  # fmt: skip
            else:
                value, stashed = self._run(group, value, key, lent, stashed)
        return Handed(value, stashed) if stashed else value

    def _run(
        self, steps: Sequence[Step], value: Any, key: Key | None, lent: Mapping[str, Tensor], stashed: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        kept = dict(stashed)
        with nullcontext() if key is None else kept_generators():
            for step in steps:
                if key is not None:
                    draw_from(key, step.layer)
                modules = step.foreign or {path: self.get_submodule(path) for path in step.paths}
                with ExitStack() as stack:
                    for borrowed in step.borrowed:
                        stack.enter_context(_lending(borrowed, lent[borrowed.skip]))
                    if step.stashes:
                        kept[step.stashes] = pytree.tree_map_only(Tensor, lambda leaf: leaf.view_as(leaf), value)
                    given = (value, kept.pop(step.pops)) if step.pops else value
                    try:
                        value = step.run(modules, given)
                    except Exception as error:
                        note(error, f"in layer {step.title}")
                        raise
        return value, kept


@contextmanager
def _lending(borrowed: Borrowed, tensor: Tensor) -> Iterator[None]:
    parameters: dict[str, Any] = borrowed.module._parameters
    parameters[borrowed.attribute] = tensor
    try:
        yield
    finally:
        parameters[borrowed.attribute] = None


def _attach(root: nn.Module, path: Sequence[str], module: nn.Module) -> None:
    """Put ``module`` where its qualified name says, with containers on the way: whoever looks for blocks sees them."""
    for name, following in pairwise(path):
        inner = root._modules.get(name)
        if inner is None:
            inner = nn.ModuleList() if following.isdigit() else nn.ModuleDict()
            root.add_module(name, inner)
        root = inner
    root.add_module(path[-1], module)
