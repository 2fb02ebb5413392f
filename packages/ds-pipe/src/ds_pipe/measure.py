"""What the layers of a model cost on this machine, measured one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .costs import Costs
from .handing import Handed
from .keeping import keeping
from .model import PipelineModule
from .stage import Kept, Stage


def measure_costs(
    model: PipelineModule, sample: Any, target: Any = None, *, repeats: int = 5, bytes_per_parameter: float = 16.0
) -> Costs:
    """Return what each layer costs in one micro-batch: each counts as a stage; ``staged`` adds them up.

    A layer is made and run as a pipeline runs it, by itself: forward, backward to its input, and to its weights, and
    forward and backward in one; once to warm up, then ``repeats`` times, of which the median counts. So the figures are
    those of this machine with what else runs on it, of the number of threads that is set, and of this shape of
    micro-batch.

    What they leave out: a layer finds its memory warm here, and cold behind others; communication, the optimizer, and
    what tied weights send are not measured: see ``Pipeline.costs`` for what a run costs. Of layers that are recomputed,
    each is so by itself. Bytes kept are those of tensors that autograd saves, each storage once, at the first layer
    that saves it, without parameters and buffers.

    Args:
        model: Its layers are made one at a time, so the whole model need not fit.
        sample: One micro-batch; layers are moved to the device of its first tensor.
        target: For ``model.loss_fn``, whose time is the last layer's; without one the output's gradient is 1.
        repeats: At least one.
        bytes_per_parameter: Of each trained one, with its gradient and the optimizer's state; the default is float32
            with Adam. Others, and buffers, count as what they are. A tied weight counts where it is first.

    Raises:
        ValueError: Too few repeats.

    Example:
        >>> costs = measure_costs(PipelineModule([nn.Linear(4, 8), nn.ReLU()]), torch.ones(2, 4), repeats=1)
        >>> costs.num_stages, costs.message_bytes, costs.kept_bytes
        (2, (32.0, 64.0), (32.0, 64.0))
    """
    if repeats < 1:
        raise ValueError(f"repeats has to be at least 1; got {repeats}")
    tied: dict[str, nn.Parameter] = {}
    stashed: dict[str, Any] = {}
    counted: set[Tensor] = set()
    saved: set[int] = set()  # storages of ``value`` that a layer before has saved
    found = []
    value = sample
    for index in range(model.num_layers):
        layer = _Layer(model, index, tied, stashed).to(_device(sample))
        loss = model.loss_fn if index == model.num_layers - 1 else None
        stage = Stage(layer, loss=loss, splits=True)
        targets = [target] if loss is not None else []
        incoming = float(sum(leaf.nbytes for leaf in _tensors(value)))
        kept_bytes, out = _kept_bytes(stage, value, targets, saved)
        whole = Stage(layer, loss=loss)
        times = [(*_timed(stage, value, targets), _whole(whole, value, targets)) for _ in range(1 + repeats)][1:]
        forward, input_grad, weight_grad, backward = (statistics.median(each) for each in zip(*times, strict=True))
        held = _held(layer.part, bytes_per_parameter, counted)
        found.append(_Found(forward, input_grad, weight_grad, backward, kept_bytes, incoming, held))
        saved &= {
            leaf.untyped_storage().data_ptr() for leaf in _tensors(out)
        }  # others are gone, and their addresses free
        value = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().requires_grad_(leaf.requires_grad), out)
    return Costs(
        forward=tuple(each.forward for each in found),
        input_grad=tuple(each.input_grad for each in found),
        weight_grad=tuple(each.weight_grad for each in found),
        backward=tuple(each.backward for each in found),
        held_bytes=tuple(each.held_bytes for each in found),
        kept_bytes=tuple(each.kept_bytes for each in found),
        message_bytes=tuple(each.message_bytes for each in found),
    )


def staged(costs: Costs, bounds: Sequence[int]) -> Costs:
    """Return the costs of stages from those of layers.

    Args:
        costs: Of each layer.
        bounds: As of ``PipelineModule.bounds``.

    Example:
        >>> staged(Costs.uniform(6), [0, 2, 6]).forward
        (2.0, 4.0)
    """

    def sums(each: Sequence[float]) -> tuple[float, ...]:
        return tuple(sum(each[first:last]) for first, last in pairwise(bounds))

    return replace(
        costs,
        forward=sums(costs.forward),
        input_grad=sums(costs.input_grad),
        weight_grad=sums(costs.weight_grad),
        backward=sums(costs.backward) if costs.backward else (),
        held_bytes=sums(costs.held_bytes) if costs.held_bytes else (),
        kept_bytes=sums(costs.kept_bytes),
        message_bytes=tuple(costs.message_bytes[first] for first in bounds[:-1]),
    )


class _Found(NamedTuple):
    """Of one layer: seconds, and bytes."""

    forward: float
    input_grad: float
    weight_grad: float
    backward: float
    kept_bytes: float
    message_bytes: float
    held_bytes: float


class _Layer(nn.Module):
    """One layer as a stage; tied weights of earlier layers are parameters here."""

    def __init__(
        self, model: PipelineModule, index: int, tied: dict[str, nn.Parameter], stashed: dict[str, Any]
    ) -> None:
        super().__init__()
        keys = [key for key, tie in model.ties.items() if index in tie.layers]
        self._stashed = stashed
        self._pops = [skip.name for skip in model.skips([*range(model.num_layers + 1)]) if skip.target == index]
        self._pops = [name for name in self._pops if name in stashed]
        self._borrowed = [key for key in keys if key in tied]
        self._weights = nn.ParameterList(tied[key] for key in self._borrowed)
        self.part = model.build(index, index + 1, borrows={key: key for key in self._borrowed})
        tied.update({key: self.part.get_parameter(model.ties[key].names[0]) for key in keys if key not in tied})

    def forward(self, value: Any) -> Any:
        weights = dict(zip(self._borrowed, self._weights, strict=True))
        out = self.part(value, skips={**weights, **{name: self._stashed[name] for name in self._pops}})
        if isinstance(out, Handed):
            self._stashed.update(pytree.tree_map_only(Tensor, torch.detach, dict(out.skips)))
            return out.out
        return out


def _timed(stage: Stage, value: Any, targets: Sequence[Any]) -> tuple[float, float, float]:
    """Return the seconds of F, I and W."""
    marks = [_now(value)]
    _, _, kept = stage.forward(value, targets, scale=1.0)
    grads = _grads(stage, kept, targets)
    marks.append(_now(value))
    stage.backward(kept, grads)
    marks.append(_now(value))
    stage.settle(kept)
    marks.append(_now(value))
    stage.module.zero_grad()
    first, second, third, fourth = marks
    return second - first, third - second, fourth - third


def _whole(stage: Stage, value: Any, targets: Sequence[Any]) -> float:
    """Return the seconds of B."""
    _, _, kept = stage.forward(value, targets, scale=1.0)
    grads = _grads(stage, kept, targets)
    start = _now(value)
    stage.backward(kept, grads)
    seconds = _now(value) - start
    stage.module.zero_grad()
    return seconds


def _held(part: nn.Module, bytes_per_parameter: float, counted: set[Tensor]) -> float:
    """Return the bytes that a layer has throughout, without those ``counted``, to which its own are added."""
    known = {*part.parameters(), *part.buffers()} - counted
    counted |= known
    return sum(tensor.numel() * bytes_per_parameter if tensor.requires_grad else tensor.nbytes for tensor in known)


def _grads(stage: Stage, kept: Kept, targets: Sequence[Any]) -> list[Tensor] | None:
    return None if targets else [torch.ones_like(out) for out in kept.outputs]


def _kept_bytes(stage: Stage, value: Any, targets: Sequence[Any], saved: set[int]) -> tuple[float, Any]:
    """Return the bytes of storages that a forward pass saves and that are not in ``saved``, and what it returns.

    Adds them to ``saved``.
    """
    with keeping(stage.module, saved) as counted:
        # with all it keeps, until everything has been counted
        out, _, _kept = stage.forward(value, targets, scale=1.0)
    return counted.nbytes, out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _device(value: Any) -> torch.device:
    return next((leaf.device for leaf in _tensors(value)), torch.device("cpu"))


def _now(value: Any) -> float:
    if _device(value).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
