"""The layers of a model: made now or later, alone or with weights in common.

[Note: Layers]
A *layer* maps one value to the next; a value may be a tuple, which a layer gets as one argument. Modules it runs are
made when they are needed, and have qualified names in the whole model, which do not depend on where it is cut. A layer
that *uses* an earlier one makes nothing: it runs that one's modules once more.

A *tie* is one parameter of several layers. It belongs to the first of them and has its name there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .noting import note
from .stash import Pop, Stash

Modules = Mapping[str, nn.Module]
"""By qualified name in the whole model."""


class LayerSpec:
    """A layer to be made where it is needed: on the rank of its stage.

    Args:
        typename: A class of modules, or a function that returns one.
        module_args: What it is called with.
        module_kwargs: And by name.

    Example:
        >>> LayerSpec(nn.Linear, 2, 3, bias=False).build()
        Linear(in_features=2, out_features=3, bias=False)
    """

    def __init__(self, typename: Callable[..., nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if isinstance(typename, nn.Module) or not callable(typename):
            raise TypeError(
                "LayerSpec takes a class and its arguments, not a module that is made (that is a layer as it is); got "
                f"{typename!r}"
            )
        self.typename = typename
        self.module_args = module_args
        self.module_kwargs = module_kwargs

    def build(self) -> nn.Module:
        """Make it."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that has a weight in common with the others of its key.

    The first of a key is made as it says. A later one of the same class runs the first one's module, through its own
    ``forward_fn``; of another class it is a module of its own, but for the tied weights. Where a stage has a later one
    without the first, only the tied weights are there: ``forward_fn`` uses nothing else of that module.

    Args:
        key: The same for all layers that belong together.
        typename: As of :class:`LayerSpec`.
        module_args: What it is called with.
        forward_fn: Called with the module and the value; None: the module is called.
        tied_weight_attr: The parameter in common, or several; dots lead into modules inside.
        module_kwargs: What it is called with, by name.

    Example:
        >>> def logits(embedding: nn.Embedding, hidden: torch.Tensor) -> torch.Tensor:
        ...     return hidden @ embedding.weight.t()
        >>> first, last = (TiedLayerSpec("embed", nn.Embedding, 9, 4, forward_fn=fn) for fn in (None, logits))
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., nn.Module],
        *module_args: Any,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = (tied_weight_attr,) if isinstance(tied_weight_attr, str) else tuple(tied_weight_attr)


class Tie(NamedTuple):
    """One parameter of several layers; see [Note: Layers]."""

    layers: tuple[int, ...]  # in order
    names: tuple[str, ...]  # what it is called in each; the first is its name in the whole model


class Layer(NamedTuple):
    """One layer; see [Note: Layers]."""

    name: str  # of its module, or a number
    kind: str  # class or function
    make: Callable[[], Modules]
    run: Callable[[Modules, Any], Any]
    uses: int  # the layer whose modules it runs; mostly itself
    ready: bool  # whether its modules are there before it is asked for them
    stashes: str = ""  # the name under which it keeps its input
    pops: str = ""  # the name of what it gets beside its input, as a pair

    @property
    def title(self) -> str:
        """What errors and tables call it."""
        return f"{self.name} ({self.kind})"

    def trained(self) -> int:
        """Return how many parameters are trained; makes nothing that takes memory where the class can do without."""
        return sum(p.numel() for module in self._shapes().values() for p in module.parameters() if p.requires_grad)

    def _shapes(self) -> Modules:
        if self.ready:
            return self.make()
        try:
            with torch.device("meta"):
                return self.make()
        except (RuntimeError, NotImplementedError):  # its constructor computes with numbers it reads back
            return self.make()


class Loan(NamedTuple):
    """A tied parameter that a stage has from another one."""

    source: int  # the stage that has it
    target: int  # the stage that borrows it
    key: str  # of ``ties``
    skip: str  # what the way from one to the other is called; no two have one name
    weight: str  # what the parameter is called in the whole model


def layers_of(items: Sequence[Any], names: Sequence[str]) -> list[Layer]:
    """Return layers made of what a user lists: specs, modules and functions.

    Raises:
        TypeError: Something is none of these.
    """
    found: list[Layer] = []
    modules: dict[nn.Module, int] = {}
    keys: dict[tuple[str, Any], int] = {}
    for index, (name, item) in enumerate(zip(names, items, strict=True)):
        if isinstance(item, TiedLayerSpec):
            uses = keys.setdefault((item.key, item.typename), index)
            found.append(_of_spec(item, names[uses], uses, item.forward_fn))
        elif isinstance(item, LayerSpec):
            found.append(_of_spec(item, name, index, None))
        elif isinstance(item, nn.Module):
            uses = modules.setdefault(item, index)
            found.append(of_module(item, names[uses], uses))
        elif isinstance(item, Stash):
            found.append(of_function(_same, name, index)._replace(kind="Stash", stashes=item.name))
        elif isinstance(item, Pop):
            found.append(of_function(_combining(item), name, index)._replace(kind="Pop", pops=item.name))
        elif callable(item):
            found.append(of_function(item, name, index))
        else:
            raise TypeError(f"layer {index} has to be a LayerSpec, a module or a function; got {item!r}")
    return found


def of_module(module: nn.Module, name: str, uses: int, run: Callable[[nn.Module, Any], Any] | None = None) -> Layer:
    """Return a layer that is a module there is."""
    return Layer(name, type(module).__name__, lambda: {name: module}, _runner(name, run), uses, ready=True)


def _of_spec(spec: LayerSpec, name: str, uses: int, run: Callable[[Any, Any], Any] | None) -> Layer:
    kind = _called(spec.typename)

    def make() -> Modules:
        try:
            return {name: spec.build()}
        except Exception as error:
            note(error, f"where layer {name} ({kind}) is made")
            raise

    return Layer(name, kind, make, _runner(name, run), uses, ready=False)


def of_function(function: Callable[[Any], Any], name: str, index: int) -> Layer:
    """Return a layer without parameters."""
    return Layer(name, _called(function), dict, lambda modules, value: function(value), index, ready=True)


def _same(value: Any) -> Any:
    return value


def _combining(pop: Pop) -> Callable[[Any], Any]:
    combine = pop.combine
    return _same if combine is None else lambda pair: combine(*pair)


def _runner(name: str, run: Callable[[Any, Any], Any] | None) -> Callable[[Modules, Any], Any]:
    if run is None:
        return lambda modules, value: modules[name](value)
    return lambda modules, value: run(modules[name], value)


def _called(item: Any) -> str:
    return str(getattr(item, "__name__", type(item).__name__))


def ties_of_specs(items: Sequence[Any], layers: Sequence[Layer], names: Sequence[str]) -> dict[str, Tie]:
    """Return the ties that specs say; a key with several weights gives one for each, ``key.weight``.

    Raises:
        ValueError: Layers of one key have different numbers of weights in common.
    """
    keys: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        if isinstance(item, TiedLayerSpec):
            keys[item.key].append(index)
    ties = {}
    for key, indices in keys.items():
        attrs = [items[index].tied_weight_attr for index in indices]
        if len({len(each) for each in attrs}) != 1:
            raise ValueError(f"layers {indices} of the key {key!r} need equally many tied weights; got {attrs}")
        for number, attr in enumerate(attrs[0]):
            called = tuple(
                f"{names[layers[index].uses]}.{each[number]}" for index, each in zip(indices, attrs, strict=True)
            )
            ties[key if len(attrs[0]) == 1 else f"{key}.{attr}"] = Tie(tuple(indices), called)
    return {key: tie for key, tie in ties.items() if len(tie.layers) > 1}


def ties_of_modules(layers: Sequence[Layer]) -> dict[str, Tie]:
    """Return the parameters that modules of several layers have in common, by their names in the whole model."""
    found: dict[nn.Parameter, dict[int, str]] = defaultdict(dict)
    for index, layer in enumerate(layers):
        if layer.ready:
            for name, param in parameters(layer.make()):
                found[param].setdefault(index, name)
    named = [Tie(tuple(places), tuple(places.values())) for places in found.values() if len(places) > 1]
    return {tie.names[0]: tie for tie in named}


def parameters(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """Return parameters and their names in the whole model, one in several places as often."""
    for path, module in modules.items():
        for name, param in module.named_parameters(remove_duplicate=False):
            yield f"{path}.{name}", param
