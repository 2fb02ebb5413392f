"""A partitioner of one process in plain torch: what the engine's own tests train with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from ds_core import loss_scale
from ds_core._control import make_control
from ds_core.engine import Engine
from ds_core.policy import StepPolicy
from ds_core.saving import Vault
from torch import Tensor, nn

from .checkpoint_kit import State, whole


class Norm(NamedTuple):
    value: float
    culprit: str | None


class PlainParking:
    """Plays the role ``Parking``; notes what is asked of it."""

    kinds = ("params", "masters", "optimizer", "gradients")

    def __init__(self) -> None:
        self.away: dict[str, int] = {}
        self.pinned: list[bool] = []

    def offload_states(self, include: Iterable[str], *, pin_memory: bool = True) -> dict[str, int]:
        self.away = {kind: 8 * (1 + self.kinds.index(kind)) for kind in include}
        self.pinned.append(pin_memory)
        return dict(self.away)

    def reload_states(self) -> int:
        nbytes, self.away = sum(self.away.values()), {}
        return nbytes


class PlainAccess:
    """Plays the role ``Access``, as far as whole parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def full_param(self, param: str) -> Tensor:
        return self.module.get_parameter(param).detach().clone()

    def set_full_param(self, param: str, value: Tensor) -> None:
        self.module.get_parameter(param).data.copy_(value)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for name, _ in self.module.named_parameters():
            yield name, self.full_param(name)


class PlainWeights:
    """Plays the role ``Weights``; notes what is to be saved."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.saved: list[tuple[str, str, bool]] = []

    def save(self, folder: str, *, name: str, frozen: bool = True) -> None:
        self.saved.append((folder, name, frozen))

    def state_dict(self, *, frozen: bool = True) -> dict[str, Tensor]:
        params = self.module.named_parameters()
        return {name: param.detach().clone() for name, param in params if frozen or param.requires_grad}


class Plain:
    """Plays the role ``Sharded``."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer
        self.access, self.parking, self.weights = PlainAccess(module), PlainParking(), PlainWeights(module)
        self.synced: list[bool] = []
        self.micro_batches = 0
        next(module.parameters()).register_post_accumulate_grad_hook(self._count)

    def _count(self, _param: Tensor) -> None:
        self.micro_batches += 1

    def set_sync(self, *, enabled: bool) -> None:
        self.synced.append(enabled)

    def grad_norm(self) -> Norm:
        grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        value = torch.stack([grad.double().norm() for grad in grads.values()]).norm().item() / self.micro_batches
        bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
        return Norm(value, bad[0] if bad else None)

    def step(self, scale: float = 1.0) -> None:
        for param in self.module.parameters():
            param.grad = None if param.grad is None else param.grad * (scale / self.micro_batches)
        type(self.optimizer).step(self.optimizer)  # like an update in one pass: not what schedules have wrapped
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        self.micro_batches = 0

    def state(self) -> State:
        tensors = {f"param/{name}": param.detach() for name, param in self.module.named_parameters()}
        groups = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        return whole(tensors, {"groups": groups})

    def load_state(self, source: Any, *, optimizer: bool = True, strict: bool = True) -> None:
        saved = source.shapes_of("param")
        for name, param in self.module.named_parameters():
            if name in saved or strict:
                flat = torch.empty(param.numel())
                source.read("param", name, 0, flat)
                param.data.copy_(flat.view(param.shape))
        if optimizer:
            for group, values in zip(self.optimizer.param_groups, source.scalars["groups"], strict=True):
                group.update(values)
        self.drop_gradients()


def engine_of(module: nn.Module, *, lr: float = 0.1, scale: Any = None, **parts: Any) -> tuple[Engine, Plain]:
    """Return an engine over plain SGD; other settings go to the policy, except the engine's own parts."""
    own = {key: parts.pop(key) for key in ("lr_scheduler", "training_dataloader") if key in parts}
    control = parts.pop("control", make_control(None))
    sharded = Plain(module, torch.optim.SGD(module.parameters(), lr=lr))
    if callable(own.get("lr_scheduler")):
        own["lr_scheduler"] = own["lr_scheduler"](sharded.optimizer)
    settings = {"train_batch_size": 2, "micro_batch_size": 1, "accumulation": 2, "device": torch.device("cpu")}
    policy = StepPolicy(**{**settings, **parts})
    scale = loss_scale.init(None) if scale is None else scale
    return Engine(sharded, policy, scale=scale, vault=Vault(control), **own), sharded


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
