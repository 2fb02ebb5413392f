"""Layers whose values skip the layers between, as in a U-Net.

[Note: Stashes]
A :class:`Stash` hands on what it gets, and a view of it to the one :class:`Pop` of its name, which comes later. In one
part of a model that is a local variable; between two stages it is a skip of the schedule, whose gradient goes straight
back. Since the view is there in both cases, gradients are added up in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Stash:
    """A layer that keeps its input for the :class:`Pop` of the same name, and hands it on.

    Memory: of a stash to another stage a message of its size, and one of its gradient's, each micro-batch; until it is
    popped, it is there on the rank of the Pop.

    Args:
        name: Of nothing else in the model.

    Example:
        >>> import torch
        >>> from .model import PipelineModule
        >>> layers = [Stash("input"), torch.nn.ReLU(), Pop("input", torch.add)]
        >>> PipelineModule(layers).build(0, 3)(torch.tensor([-1.0, 2.0]))
        tensor([-1.,  4.])
    """

    def __init__(self, name: str) -> None:
        self.name = name


class Pop:
    """A layer that takes what the :class:`Stash` of the same name has kept.

    Args:
        name: As of the Stash.
        combine: Maps the value and what was kept to one value; None: the next layer gets both, as a tuple.
    """

    def __init__(self, name: str, combine: Callable[[Any, Any], Any] | None = None) -> None:
        self.name = name
        self.combine = combine


def pairs_of(stashes: Sequence[str], pops: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Return of each stash the name and the indices of the two layers.

    Args:
        stashes: What each layer stashes; or nothing.
        pops: What each layer pops; or nothing.

    Raises:
        ValueError: A Stash is not popped, twice, or before it is there; or two have one name.
    """
    for name in sorted({*stashes, *pops} - {""}):
        first, last = ([index for index, each in enumerate(found) if each == name] for found in (stashes, pops))
        if len(first) != 1 or len(last) != 1 or first[0] > last[0]:
            raise ValueError(
                f"a Stash has one Pop of its name, {name!r}, and that comes later; got Stash as layers {first}, Pop as "
                f"layers {last}"
            )
        yield name, first[0], last[0]
