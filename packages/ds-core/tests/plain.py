"""A partitioner of one process in plain torch: what the engine's own tests train with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from ds_core import loss_scale
from ds_core._control import make_control
from ds_core.engine import Engine, StepPolicy
from ds_core.saving import Vault
from torch import Tensor, nn


class Norm(NamedTuple):
    value: float
    culprit: str | None


class Piece(NamedTuple):
    name: str
    role: str
    shape: torch.Size
    start: int
    data: Tensor


class State(NamedTuple):
    pieces: list[Piece]
    shapes: dict[str, torch.Size]
    scalars: dict[str, Any]


class Plain:
    """Plays the role ``Sharded``."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer
        self.synced: list[bool] = []
        self.num_passes = 0
        next(module.parameters()).register_post_accumulate_grad_hook(self._count)

    def _count(self, _param: Tensor) -> None:
        self.num_passes += 1

    def set_sync(self, *, enabled: bool) -> None:
        self.synced.append(enabled)

    def grad_norm(self) -> Norm:
        grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        value = torch.stack([grad.double().norm() for grad in grads.values()]).norm().item() / self.num_passes
        bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
        return Norm(value, bad[0] if bad else None)

    def step(self, scale: float | None = 1.0) -> None:
        if scale is not None:
            for param in self.module.parameters():
                param.grad = None if param.grad is None else param.grad * (scale / self.num_passes)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_passes = 0

    def state(self) -> State:
        named = dict(self.module.named_parameters())
        pieces = [Piece(name, "param", p.shape, 0, p.detach().reshape(-1)) for name, p in named.items()]
        return State(pieces, {name: p.shape for name, p in named.items()}, {})

    def load_state(self, source: Any, *, optimizer: bool = True) -> None:
        for name, param in self.module.named_parameters():
            flat = torch.empty(param.numel())
            source.read("param", name, 0, flat)
            param.data.copy_(flat.view(param.shape))


def engine_of(module: nn.Module, *, lr: float = 0.1, scale: Any = None, **parts: Any) -> tuple[Engine, Plain]:
    """Return an engine over plain SGD; other settings go to the policy, except the engine's own parts."""
    own = {key: parts.pop(key) for key in ("lr_scheduler", "training_dataloader") if key in parts}
    sharded = Plain(module, torch.optim.SGD(module.parameters(), lr=lr))
    settings = {"train_batch_size": 2, "micro_batch_size": 1, "accumulation": 2, "device": torch.device("cpu")}
    policy = StepPolicy(**{**settings, **parts})
    scale = loss_scale.init(None) if scale is None else scale
    return Engine(sharded, policy, scale=scale, vault=Vault(make_control(None)), **own), sharded


class Probe(nn.Module):
    """One parameter; its gradient is the input. Notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.drawn.append(torch.rand(()).item())
        return self.weight * x


INF, NAN = math.inf, math.nan
