"""What the optimizers for slow links share: flat buffers, the loop, state that does not depend on the ranks.

[Note: Training with these optimizers]
They communicate themselves: the model is not wrapped in DistributedDataParallel, each rank computes the gradients of
its own samples, and ``step`` exchanges what the method needs, in one flat float32 buffer of all parameters. All ranks
call ``step`` equally often, and their parameters then have the same bits (within a round of local steps, at its end).

At construction, and when a group is added, parameters become those of the group's first rank. A missing gradient counts
as zero, since other ranks may have one; parameters without ``requires_grad`` stay as they are.

``state_dict`` and ``load_state_dict`` are called by all ranks. Per parameter the state holds moments in float32, and
``error``: what compression has yet to send, added up over ranks; see [Note: Compressed all-reduce]. So it is the same
on all ranks and loads on any number of them. Counters stand in every parameter group, like torch's hyperparameters.

If a gradient is not finite on some rank, no rank changes anything: ``on_nonfinite`` says whether ``step`` raises
FloatingPointError on all of them, or returns and counts in ``skipped_steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..all_reduce import CompressedAllReduce, is_finite, mean_exactly, place_in
from ..codec import check_codec
from ..traffic import Traffic
from .agreement import check_agreed, settings_of
from .flat import Flat
from .link import Link

if TYPE_CHECKING:
    from ..codec import Codec


class FlatOptimizer(torch.optim.Optimizer):
    """Runs :meth:`update` on flat buffers; see [Note: Training with these optimizers].

    Subclasses name their state: ``buffers``, flat and float32; ``numbers``, one for each parameter, and ``counters``,
    one for each group, each with its value before the first step.
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counters: ClassVar[Mapping[str, float]] = {"step": 0}
    numbers: ClassVar[Mapping[str, float]] = {}

    def __init__(self, params: ParamsT, defaults: dict[str, Any], codec: Codec, link: Link) -> None:
        check_settings(defaults)
        check_codec("codec", codec)
        self._codec, self._link = codec, link
        self._ready = False
        self.traffic = Traffic()  # bytes of all steps; those of saving and of the first broadcast are not in it
        self.skipped_steps = 0
        super().__init__(params, {**defaults, **self.counters})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before the first step; its parameters become those of the group's first rank."""
        if self._ready:
            raise RuntimeError(
                "parameter groups are added before the first step, since all parameters share buffers; got a further "
                f"one after {self.param_groups[0]['step']} steps: make a new optimizer"
            )
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        shapes = [f"parameter {i} of a group, {tuple(p.shape)}, {p.dtype}" for i, p in enumerate(params)]
        check_agreed(shapes, self._link.group)
        for param in params:
            self._begin_equal(param.detach())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step once. All ranks call it.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            FloatingPointError: On all ranks: a gradient was not finite on some rank, and ``on_nonfinite`` is "raise".
                Parameters and state are as before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        if not self.update():
            self._refuse()
        return loss

    def update(self) -> bool:
        """Step the parameters; return False, and change nothing, if some rank's gradients are not finite."""
        raise NotImplementedError(f"{type(self).__name__} has to say what a step does")

    # State #

    def state_dict(self) -> dict[str, Any]:
        """Return the state, the same on all ranks. All ranks call it."""
        self._prepare()
        state = super().state_dict()
        with torch.no_grad():
            errors = self._flat.views(self._reducer.residual())
        for index, error in enumerate(errors):
            state["state"][index] = {**state["state"].get(index, {}), "error": error}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any number of ranks. All ranks call it with the same state."""
        self._prepare()
        super().load_state_dict(state_dict)
        # read from the argument: torch has converted its copy to the parameters' data type
        saved = [state_dict["state"][key] for key in chain(*(each["params"] for each in state_dict["param_groups"]))]
        error = self._flat.new()
        with torch.no_grad():
            for name, buffer in {**self._buffers, "error": error}.items():
                for state, view in zip(saved, self._flat.views(buffer), strict=True):
                    view.copy_(state[name])
            self._reducer.load_residual(error)
        self._name_state()
        for state, param in zip(saved, self._flat.params, strict=True):
            self.state[param].update({name: state[name] for name in self.numbers})
        self.loaded()

    def loaded(self) -> None:
        """Renew what was derived from the state."""

    def _prepare(self) -> None:
        """Make the buffers, once all parameter groups are known."""
        if self._ready:
            return
        self._ready = True
        self._flat = Flat(self.param_groups)
        check_agreed(self._settings(), self._link.group)
        self._buffers = {name: self._flat.new() for name in self.buffers}
        self._message = self._flat.new()
        self._reducer = CompressedAllReduce(
            self._flat.numel, self._codec, group=self._link.group, device=self._flat.device, traffic=self.traffic
        )
        self._name_state()

    def _settings(self) -> list[str]:
        """Return what ranks have to agree on, besides shapes."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return [
            f"a step of {type(self).__name__}, {len(groups)} parameter groups",
            *settings_of(self),
            *(f"{name} = {value}" for each in (self._link.agreed, *groups) for name, value in sorted(each.items())),
            f"codes: {self._codec.meaning}",
        ]

    def _name_state(self) -> None:
        """Let ``state`` show parts of the buffers, and numbers as they begin."""
        self.state.clear()
        for param in self._flat.params:
            self.state[param].update(self.numbers)
        for name, buffer in self._buffers.items():
            for param, view in zip(self._flat.params, self._flat.views(buffer), strict=True):
                self.state[param][name] = view

    def _begin_equal(self, param: Tensor) -> None:
        if any(stride == 0 < size - 1 for stride, size in zip(param.stride(), param.shape, strict=True)):
            raise ValueError(
                f"parameters must have memory of their own for every element; got strides {param.stride()} for the "
                f"shape {tuple(param.shape)}, as in the stand-ins of a partitioner: {type(self).__name__} exchanges "
                "messages itself, and is used in a plain loop, without ds-zero"
            )
        _, size = place_in(self._link.group)
        if size > 1:
            message = param.contiguous()
            dist.broadcast(message, group=self._link.group, group_src=0)
            param.copy_(message)

    # Parts of a step #

    def count(self, name: str) -> int:
        """Return a counter."""
        return int(self.param_groups[0][name])

    def set_counts(self, **values: float) -> None:
        """Set counters."""
        for group in self.param_groups:
            group.update(values)

    def exact_mean(self) -> bool:
        """Replace the message by its mean over ranks, uncompressed; return whether that is finite."""
        mean_exactly(self._message, self._link.group, dtype=self._link.exact_dtype, traffic=self.traffic)
        return is_finite(self._message)

    def move(self, direction: Tensor, denominator: Tensor | None = None) -> None:
        """Subtract ``lr * (direction / denominator + weight_decay * p)`` from every parameter."""
        denominators = None if denominator is None else self._flat.views(denominator)
        for index, (param, view) in enumerate(zip(self._flat.params, self._flat.views(direction), strict=True)):
            if not param.requires_grad:
                continue
            group = self.param_groups[self._flat.owners[index]]
            lr = float(group["lr"])
            if group["weight_decay"]:
                param.mul_(1 - lr * group["weight_decay"])
            if denominators is None:
                param.add_(view, alpha=-lr)
            elif param.dtype == view.dtype:
                param.addcdiv_(view, denominators[index], value=-lr)
            else:
                param.add_(view / denominators[index], alpha=-lr)

    def _refuse(self) -> None:
        self.skipped_steps += 1
        if self._link.on_nonfinite == "skip":
            return
        rank, size = place_in(self._link.group)
        bad = [
            f"parameter {index}, shape {tuple(param.shape)}"
            for index, param in enumerate(self._flat.params)
            if param.grad is not None and not bool(param.grad.isfinite().all())
        ]
        raise FloatingPointError(
            f"gradients must be finite; on rank {rank} of {size} not finite: "
            f"{'; '.join(bad) or 'none here, but on another rank, or earlier in the round'}. Nothing of this step, or "
            "of this round of local steps, is kept; on_nonfinite='skip' goes on"
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings out of their bounds.

    Raises:
        ValueError: One is; the text names it.
    """
    for name in ("lr", "eps", "weight_decay"):
        value = settings.get(name, 0.0)
        if not value >= 0:
            raise ValueError(f"{name} must not be negative; got {value!r}")
    decays = {f"betas[{index}]": beta for index, beta in enumerate(settings.get("betas", ()))}
    for name, value in {**decays, "momentum": settings.get("momentum", 0.0)}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {value!r}")
