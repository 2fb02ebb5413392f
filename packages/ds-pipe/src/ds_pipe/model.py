"""A model as a row of layers, cut into stages of which each rank makes its own."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from . import causal_lm
from .assembly import assemble
from .elsewhere import Elsewhere, refuse_arguments
from .keyed import kept_generators
from .layers import Layer, Loan, Tie, layers_of, ties_of_modules, ties_of_specs
from .partition import balanced, uniform
from .skips import Skip, checked
from .stash import pairs_of

if TYPE_CHECKING:
    from .part import Part

_RUNS = 6  # that repr shows
_METHODS = "'uniform', 'parameters' and 'type:REGEX'"


class PipelineModule:
    """A description of a model: what its layers are, not what is in them.

    Of a layer given as :class:`~ds_pipe.layers.LayerSpec` nothing is there until :meth:`build`; a ready module is on
    every rank that describes the model.

    Args:
        layers: One after the other, each a ``LayerSpec``, a ``TiedLayerSpec``, a module, a function, or a ``Stash`` or
            ``Pop`` of what goes past layers. A layer gets what the one before returns as one argument, also a tuple;
            the first one the micro-batch.
        num_stages: Stages on all ranks, for who builds them; None: they decide.
        loss_fn: Maps the last layer's output and a target to a number.
        partition_method: What stages have equally much of: ``uniform`` layers, ``parameters`` that are trained, or
            layers whose class name matches, ``type:REGEX``, in any case of letters.
        activation_checkpoint_interval: Keep, of so many layers each, the input only and run them again in the backward
            pass; 0: keep everything. The bits are the same.
        seed_layers: Make each layer from the seed ``base_seed`` and its index; otherwise, from ``torch.initial_seed()``
            and its index. So initial values do not depend on where the model is cut; with the first, neither on what
            the caller has seeded.
        base_seed: See there.
        others: None; who gives one of DeepSpeed's is told what to do instead.

    Raises:
        TypeError: Other arguments, or something that is no layer.
        ValueError: No layer, a name that cannot be, or settings that do not fit.

    Example:
        >>> from .layers import LayerSpec
        >>> specs = [LayerSpec(nn.Linear, 4, 8), nn.ReLU(), LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.Linear, 8, 2)]
        >>> model = PipelineModule(specs, loss_fn=nn.functional.mse_loss)
        >>> model.num_layers, model.bounds(2)
        (4, [0, 2, 4])
        >>> [name for name, _ in model.build(2, 4).named_parameters()]
        ['2.weight', '2.bias', '3.weight', '3.bias']
    """

    def __init__(
        self,
        layers: Sequence[Any],
        *,
        num_stages: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        seed_layers: bool = True,
        base_seed: int = 1234,
        **others: NoReturn,
    ) -> None:
        refuse_arguments(others)
        items = list(layers)
        names = [str(index) for index in range(len(items))]
        made = layers_of(items, names)
        self._layers: Sequence[Layer] = made
        self.ties: Mapping[str, Tie] = {**ties_of_specs(items, made, names), **ties_of_modules(made)}
        """Parameters that several layers have in common, by key; of ready modules by their names."""
        self.num_stages = num_stages
        self.loss_fn = loss_fn
        self._method = partition_method
        self._interval = activation_checkpoint_interval
        self._base_seed = base_seed if seed_layers else None
        self._stashes = [*pairs_of([layer.stashes for layer in made], [layer.pops for layer in made])]
        self._check()

    parameters = named_parameters = Elsewhere("build() or initialize() makes parameters; leave model_parameters out")
    to = cuda = Elsewhere("initialize() moves what it makes; to() is a method of what build() returns")
    train = eval = Elsewhere("train() and eval() are methods of the engine, and of what build() returns")

    @classmethod
    def from_sequential(cls, model: nn.Sequential, **settings: Any) -> PipelineModule:
        """Return the description of an ``nn.Sequential``: its children are the layers, and keep their names.

        Args:
            model: It; not changed.
            settings: As of the class.

        Example:
            >>> model = PipelineModule.from_sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
            >>> model.num_layers
            3
        """
        # named_children() leaves out a module that is there a second time
        children = dict(model._modules)
        made = cls([*children.values()], **settings)
        return made._named(layers_of([*children.values()], [*children]))

    @classmethod
    def from_causal_lm(
        cls, model: nn.Module, *, layers: str | None = None, after: causal_lm.After | None = None, **settings: Any
    ) -> PipelineModule:
        """Return the description of a causal language model as Hugging Face writes them; see [Note: Causal models].

        Its first layer maps token ids (batch, tokens), or a dictionary of the model's arguments, to hidden states; its
        last one returns logits (batch, tokens, vocabulary). They are those of ``model(..., use_cache=False)``.

        Args:
            model: It; not changed. On the device ``meta`` it costs nothing, and a stage's weights are loaded by name.
            layers: Where its decoder layers are, as ``model.layers``; None: where such models mostly have them.
            after: What follows them, as ``("model.norm", "lm_head")``; also functions, if logits are scaled or capped.
            settings: As of the class.

        Raises:
            ValueError: The model is built in another way; says what was looked for. Models that are not on ``meta``
                are tried out once, on four tokens.
        """
        found = causal_lm.layers_of(model, layers, after)
        return cls([nn.Identity()], **settings)._named(found)

    def _named(self, layers: Sequence[Layer]) -> PipelineModule:
        self._layers = layers
        self.ties = ties_of_modules(layers)
        self._check()
        return self

    def _check(self) -> None:
        if not self._layers:
            raise ValueError("a model has at least one layer; got none")
        if self._interval < 0:
            raise ValueError(f"activation_checkpoint_interval is a number of layers, or 0; got {self._interval}")
        if self._method.lower() not in ("uniform", "parameters") and not self._method.lower().startswith("type:"):
            raise ValueError(f"partition_method is one of {_METHODS}; got {self._method!r}")

    def __repr__(self) -> str:
        return (
            f"PipelineModule of {self.num_layers} layers, {self._runs()}; num_stages={self.num_stages}, "
            f"{len(self.ties)} tied, {'with' if self.loss_fn else 'without'} loss"
        )

    def _runs(self) -> str:
        """Return the kinds of layers, those in a row counted, in the middle shortened."""
        runs = [f"{sum(1 for _ in same)} {kind}" for kind, same in groupby(layer.kind for layer in self._layers)]
        return ", ".join(runs if len(runs) <= _RUNS else [*runs[: _RUNS - 2], "...", runs[-1]])

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self._layers)

    @property
    def layer_names(self) -> list[str]:
        """What the layers are called, for tables."""
        again = [" again" if layer.uses != index else "" for index, layer in enumerate(self._layers)]
        return [f"{layer.title}{more}" for layer, more in zip(self._layers, again, strict=True)]

    def outline(self, bounds: Sequence[int]) -> str:
        """Return a short text that differs for other classes of layers, ties, or cuts: all ranks describe one model.

        Args:
            bounds: As of :meth:`bounds`.

        Example:
            >>> model = PipelineModule([nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh()])
            >>> model.outline([0, 2, 3])[:45]
            '3 layers (2 Linear, 1 Tanh) cut at [0, 2, 3] '
        """
        ties = [(key, tie.layers, tie.names) for key, tie in self.ties.items()]
        content = hashlib.sha256(repr((self.layer_names, ties)).encode()).hexdigest()[:12]
        return f"{self.num_layers} layers ({self._runs()}) cut at {[*bounds]} ({content})"

    def bounds(self, num_stages: int, *, seconds: Sequence[float] | None = None) -> list[int]:
        """Return where to cut: stage s has the layers from ``bounds[s]`` to before ``bounds[s + 1]``, at least one.

        The largest stage is as small as can be, in what ``partition_method`` counts.

        Args:
            num_stages: Stages.
            seconds: Of each layer, measured: counted in place of what ``partition_method`` says.

        Raises:
            ValueError: More stages than layers, another number of times than layers, or a regex that nothing matches.
        """
        if seconds is not None:
            if len(seconds) != self.num_layers:
                raise ValueError(f"seconds of {self.num_layers} layers are needed; got {len(seconds)}")
            return balanced(seconds, num_stages)
        method, _, pattern = self._method.partition(":")
        if method.lower() == "uniform":
            return uniform(self.num_layers, num_stages)
        if method.lower() == "parameters":
            with kept_generators():
                return balanced([layer.trained() for layer in self._layers], num_stages)
        matches = [bool(re.search(pattern, layer.kind, re.IGNORECASE)) for layer in self._layers]
        if not any(matches):
            kinds = ", ".join(dict.fromkeys(layer.kind for layer in self._layers))
            raise ValueError(f"no layer's class matches {pattern!r} of partition_method {self._method!r}; got {kinds}")
        return balanced(matches, num_stages)

    def loans(self, bounds: Sequence[int]) -> list[Loan]:
        """Return the tied parameters that stages borrow from another one, by target.

        Args:
            bounds: As of :meth:`bounds`.

        Example:
            >>> from .layers import TiedLayerSpec
            >>> model = PipelineModule([TiedLayerSpec("w", nn.Linear, 4, 4, bias=False) for _ in range(3)])
            >>> for loan in model.loans([0, 1, 3]):
            ...     print(*loan)
            0 1 w w@1 0.weight
            >>> last = model.build(1, 3, borrows={"w": "w@1"})
            >>> last(torch.ones(1, 4), skips={"w@1": torch.ones(4, 4)})
            tensor([[16., 16., 16., 16.]])
        """
        found = []
        for key, tie in self.ties.items():
            source, *others = (bisect_right(bounds, layer) - 1 for layer in tie.layers)
            for target in sorted({*others} - {source}):
                found.append(Loan(source, target, key, f"{key}@{target}", tie.names[0]))
        return sorted(found, key=lambda loan: loan.target)

    def skips(self, bounds: Sequence[int]) -> tuple[Skip, ...]:
        """Return what goes past stages: tied parameters, and what a ``Stash`` keeps for another stage.

        Args:
            bounds: As of :meth:`bounds`.

        Example:
            >>> from .stash import Pop, Stash
            >>> model = PipelineModule([Stash("a"), nn.Linear(2, 2), nn.Tanh(), Pop("a", torch.add)])
            >>> [str(skip) for skip in model.skips([0, 1, 4])]
            ['0>1:a']
        """
        found = [Skip(loan.source, loan.target, loan.skip, constant=True) for loan in self.loans(bounds)]
        for name, *layers in self._stashes:
            source, target = (bisect_right(bounds, layer) - 1 for layer in layers)
            found += [Skip(source, target, name)] if source != target else []
        return checked(found, len(bounds) - 1)

    def build(
        self, first: int, last: int, *, borrows: Mapping[str, str] = MappingProxyType({}), interval: int = 0
    ) -> Part:
        """Make the layers ``first`` to before ``last``; no memory is taken for the others.

        Names and initial values of parameters and buffers are those of the whole model, ``build(0, num_layers)``.

        A tied parameter belongs to the part that has the first of its layers, and a part that has a later one borrows
        it: it is none of its parameters, and has to come with each forward pass. Its gradient is computed with those of
        the inputs, never later.

        Args:
            first: Index of a layer.
            last: Index after the last one.
            borrows: By key of ``ties``, the name under which the part gets a weight; see :meth:`loans`.
            interval: In place of ``activation_checkpoint_interval``; 0: that.

        Raises:
            ValueError: There are no such layers; or a tied parameter is needed that is not borrowed; or layers on both
                sides of the cut have a buffer in common.
        """
        if not 0 <= first < last <= self.num_layers:
            raise ValueError(f"0 <= first < last <= {self.num_layers} has to hold; got first={first}, last={last}")
        base = torch.initial_seed() if self._base_seed is None else self._base_seed
        with kept_generators():
            return assemble(
                self._layers,
                self.ties,
                range(first, last),
                borrows=borrows,
                seed=base,
                interval=interval or self._interval,
            )
