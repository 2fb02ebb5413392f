"""Finds the layers of a causal language model in the way Hugging Face writes them.

[Note: Causal models]
A model embeds token ids, runs decoder layers one after the other, each with masks and positions beside hidden states,
and ends in a norm and a head. What comes before the decoder layers the model's own ``forward`` does, which calls
stand-ins for these layers: they note down what each would have been called with. The layers are then called so,
wherever they are, and what they are called with travels beside the hidden states. Norm and head are simply called.

Between stages go ``(hidden, shared, calls, which)``: hidden states; the different values that layers are called with,
each once; the different calls, with a value's place in ``shared`` for the value; and by layer which of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .layers import Layer, Modules, of_function, of_module

After: TypeAlias = "Sequence[str | Callable[[Any], Any]]"
"""What follows decoder layers: modules by name, the first one to begin with, and functions."""

_FAMILIES: Sequence[tuple[str, After]] = (
    ("model.layers", ("model.norm", "lm_head")),  # Llama, Mistral, Qwen, Gemma, OLMo
    ("model.layers", ("model.final_layernorm", "lm_head")),  # Phi
    ("transformer.h", ("transformer.ln_f", "lm_head")),  # GPT-2, BLOOM, Falcon
    ("gpt_neox.layers", ("gpt_neox.final_layer_norm", "lm_head")),
    ("gpt_neox.layers", ("gpt_neox.final_layer_norm", "embed_out")),
    ("model.decoder.layers", ("model.decoder.final_layer_norm", "lm_head")),  # OPT
)


def layers_of(model: nn.Module, path: str | None, after: After | None) -> list[Layer]:
    """Return the layers of a causal model: one for what is before the decoder layers, these, and what follows.

    Raises:
        ValueError: As of ``PipelineModule.from_causal_lm``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    path, after = _where(modules, path, after)
    names = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    count = len(names)
    before = _before(model, [*names, *(each for each in after if isinstance(each, str))])
    found = [Layer("embeddings", "Embeddings", lambda: before, _Embedding(model, modules[path]), 0, ready=True)]
    found += [
        of_module(modules[name], name, index + 1, partial(_decode, index, index == count - 1))
        for index, name in enumerate(names)
    ]
    for index, each in enumerate(after, start=1 + count):
        take = _hidden if index == 1 + count else None
        found.append(
            of_module(modules[each], each, index, take)
            if isinstance(each, str)
            else of_function(each, f"after.{index - 1 - count}", index)
        )
    if not any(param.is_meta for param in model.parameters()):
        _try_out(model, found)
    return found


def _where(modules: Mapping[str, nn.Module], path: str | None, after: After | None) -> tuple[str, After]:
    if (path is None) != (after is None):
        raise ValueError(f"say both where decoder layers are and what follows; got layers={path!r}, after={after!r}")
    known = _FAMILIES if path is None or after is None else ((path, tuple(after)),)
    for layers, following in known:
        paths = [each for each in following if isinstance(each, str)]
        if layers in modules and all(name in modules for name in paths) and paths[:1] == [*following[:1]]:
            return layers, following
    looked = "; ".join(f"{layers}, followed by {' and '.join(map(str, following))}" for layers, following in known)
    outer = [name for name in modules if name and name.count(".") < 2][:20]
    raise ValueError(
        f"there are no decoder layers where they were looked for: {looked}. The model has {outer}: say where, "
        "from_causal_lm(model, layers=..., after=...)"
    )


def _before(model: nn.Module, others: Sequence[str]) -> Modules:
    """Return what of ``model`` is not among ``others``: whole modules, as large as can be."""
    found: dict[str, nn.Module] = {}

    def look(module: nn.Module, path: str) -> None:
        if any(other == path or path.startswith(f"{other}.") for other in others):
            return
        if path and not any(other.startswith(f"{path}.") for other in others):
            found[path] = module
            return
        own = [*module._parameters, *module._buffers]
        if own:
            raise ValueError(f"{path or 'the model'} itself has {own}, and parts of it lie in several layers")
        for name, inner in module.named_children():
            look(inner, f"{path}.{name}" if path else name)

    look(model, "")
    return found


class _Reached(Exception):  # noqa: N818 - no error: the way out of the model's forward
    """All decoder layers have been called."""


class _Embedding:
    """Runs a model up to its first decoder layer; see [Note: Causal models]."""

    def __init__(self, model: nn.Module, layers: nn.Module) -> None:
        self._model = model
        self._layers = layers
        self._settings = _settings(model)

    def __call__(self, modules: Modules, value: Any) -> tuple[Tensor, list[Any], list[Any], list[int]]:
        """Return what goes to the first decoder layer; ``modules`` are those that the model runs."""
        calls: list[_Call] = []
        with _noting(self._layers, calls):
            try:
                if isinstance(value, Mapping):
                    self._model(**self._settings, **value)
                else:
                    self._model(value, **self._settings)
            except _Reached:
                pass
            else:
                raise RuntimeError(f"the model ran without all of its decoder layers; it called {len(calls)}")
        return (calls[0].hidden, *_compact(calls))


def _settings(model: nn.Module) -> dict[str, bool]:
    """Return how to call a model: a cache for the next tokens is nothing for training, and no value to send."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


class _Call(NamedTuple):
    """What a decoder layer is called with."""

    hidden: Tensor
    rest: tuple[tuple[Any, ...], dict[str, Any]]


class _Noting(nn.Module):
    """Stands in for a decoder layer: notes how it is called, and returns its input."""

    def __init__(self, layer: nn.Module, calls: list[_Call], *, last: bool) -> None:
        super().__init__()
        # not as a module: attributes are looked up there, see __getattr__
        vars(self).update(_layer=layer, _calls=calls, _last=last)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._calls.append(_Call(hidden, (args, kwargs)))
        if self._last:
            raise _Reached
        return (hidden,)


@contextmanager
def _noting(layers: nn.Module, calls: list[_Call]) -> Iterator[None]:
    # in place of the layers, rather than within them: hooks of the layers have to wait for the real calls
    before = dict(layers._modules)
    *_, last = before
    layers._modules.update({name: _Noting(layer, calls, last=name == last) for name, layer in before.items() if layer})
    try:
        yield
    finally:
        layers._modules.update(before)


def _compact(calls: Sequence[_Call]) -> tuple[list[Any], list[Any], list[int]]:
    """Return different values, different calls made of their places, and by layer its call."""
    shared: list[Any] = []
    places: dict[int, int] = {}
    different: list[Any] = []
    which = []
    for call in calls:
        leaves, structure = pytree.tree_flatten(call.rest)
        for leaf in leaves:
            if id(leaf) not in places:
                places[id(leaf)] = len(shared)
                shared.append(leaf)
        plain = pytree.tree_unflatten([places[id(leaf)] for leaf in leaves], structure)
        if plain not in different:
            different.append(plain)
        which.append(different.index(plain))
    return shared, different, which


def _decode(index: int, last: bool, layer: nn.Module, value: Any) -> Any:  # noqa: FBT001 - bound by partial
    hidden, shared, calls, which = value
    args, kwargs = pytree.tree_map(lambda place: shared[place], calls[which[index]])
    out = layer(hidden, *args, **kwargs)
    hidden = out[0] if isinstance(out, tuple) else out
    return (hidden, [], [], []) if last else (hidden, shared, calls, which)


def _hidden(layer: nn.Module, value: Any) -> Any:
    return layer(value[0])


def _try_out(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Check on four tokens that the layers do what the model does; training modes stay."""
    modes = {module: module.training for module in model.modules()}
    tokens = torch.tensor([[0, 1, 1, 0]], device=next(model.parameters()).device)
    try:
        model.eval()
        with torch.no_grad():
            out = model(tokens, **_settings(model))
            want = out if isinstance(out, Tensor) else out[0]
            value: Any = tokens
            for layer in layers:
                value = layer.run(layer.make(), value)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not torch.equal(value.nan_to_num(), want.nan_to_num()):
        raise ValueError(
            f"run layer by layer, the model gives other logits: between {layers[0].name} and {layers[-1].name} it does "
            "something else than to call them. What it does to logits can be a function at the end of after=; "
            "otherwise, describe the model as a list of layers"
        )
