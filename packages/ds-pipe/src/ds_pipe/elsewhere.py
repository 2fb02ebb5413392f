"""What a model's description does not have, and where it is instead."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "topology": "say num_stages, the ranks of one pipeline; the other ranks make pipelines beside it",
        "checkpointable_layers": "activation_checkpoint_interval takes all layers; leave it out",
        "activation_checkpoint_func": "activation_checkpoint_interval says what is recomputed; leave it out",
        "seed_fn": "each layer is made from base_seed and its index; leave it out",
        "dynamic_shape": "micro-batches may have any shapes; leave it out",
    }
)
"""Of DeepSpeed's ``PipelineModule``, those that there are not, with what to do instead."""


class Elsewhere:
    """An attribute of modules that a description does not have: whoever asks for it is told where it is.

    Args:
        text: What to do instead.

    Example:
        >>> class Description:
        ...     parameters = Elsewhere("build() makes them")
        >>> Description().parameters()
        Traceback (most recent call last):
        AttributeError: a PipelineModule is a description, not a module: build() makes them
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type | None = None) -> NoReturn:
        """Say it."""
        raise AttributeError(f"a PipelineModule is a description, not a module: {self._text}")


def refuse_arguments(given: Mapping[str, object]) -> None:
    """Return if there are none.

    Raises:
        TypeError: There is one; says what to do instead.
    """
    for name, value in given.items():
        raise TypeError(f"PipelineModule has no argument {name} (got {value!r}){_instead(name)}")


def _instead(name: str) -> str:
    return f": {ARGUMENTS[name]}" if name in ARGUMENTS else "; help(PipelineModule) lists those it has"
