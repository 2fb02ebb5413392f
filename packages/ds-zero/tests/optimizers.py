"""The table of optimizers under contract, and a model with every kind of parameter to train by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from ds_testkit.models import Block
from ds_zero.optim import Lamb, Lars, Muon
from torch import Tensor, nn
from torch.nn import functional as F


class Shampoo(torch.optim.Optimizer):
    """Preconditioners in a list, their roots in a tuple, counters as numbers and as tensors: nobody declares it."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, self.state[param], group["lr"])

    def _step(self, param: Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            state["step"] = 0
            state["seen"] = torch.zeros(())
            state["factors"] = [torch.eye(size) for size in param.shape if param.dim() > 1]
            state["note"] = {"order": param.dim(), "name": None}
        state["step"] += 1
        state["seen"] += 1
        update = param.grad
        roots = []
        for dim, factor in enumerate(state["factors"]):
            rows = param.grad.transpose(0, dim).reshape(param.shape[dim], -1)
            factor += rows @ rows.T
            values, vectors = torch.linalg.eigh(factor)
            roots.append(vectors @ torch.diag(values.clamp(min=1e-6) ** (-0.5 / param.dim())) @ vectors.T)
            update = torch.tensordot(roots[-1], update.transpose(0, dim), 1).transpose(0, dim)
        state["roots"] = tuple(roots)
        param.add_(update, alpha=-lr)


class Centered(torch.optim.SGD):
    """A subclass of an elementwise class that is not: it takes the mean of each tensor out of its gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.sub_(param.grad.mean())
        super().step()


class Row(NamedTuple):
    """An optimizer under contract."""

    make: Callable[[Any], torch.optim.Optimizer]
    whole: bool = False  # whether its state is exported by owners
    few: bool = False  # whether it is also run on four ranks, in other precisions, and saved


TABLE = {
    "SGD": Row(lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "Adam": Row(lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True)),
    "AdamW": Row(lambda groups: torch.optim.AdamW(groups, lr=0.01), few=True),
    "Adamax": Row(lambda groups: torch.optim.Adamax(groups, lr=0.01)),
    "NAdam": Row(lambda groups: torch.optim.NAdam(groups, lr=0.01)),
    "RAdam": Row(lambda groups: torch.optim.RAdam(groups, lr=0.01)),
    "RMSprop": Row(lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9, centered=True)),
    "Rprop": Row(lambda groups: torch.optim.Rprop(groups, lr=0.01)),
    "Adagrad": Row(lambda groups: torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1)),
    "Adadelta": Row(lambda groups: torch.optim.Adadelta(groups, lr=0.1)),
    "ASGD": Row(lambda groups: torch.optim.ASGD(groups, lr=0.05, lambd=0.1, t0=1.0)),
    "Lamb": Row(lambda groups: Lamb(groups, lr=0.01, weight_decay=0.01), few=True),
    "Lars": Row(lambda groups: Lars(groups, lr=1.0, weight_decay=0.01, trust=0.02), few=True),
    "Muon": Row(lambda groups: Muon(groups, adam_lr=0.01, weight_decay=0.01), whole=True, few=True),
    "Adafactor": Row(lambda groups: torch.optim.Adafactor(groups, lr=0.05, weight_decay=0.01), whole=True, few=True),
    "Shampoo": Row(Shampoo, whole=True, few=True),
    "Centered": Row(lambda groups: Centered(groups, lr=0.05, momentum=0.9), whole=True),
}


class Everything(nn.Module):
    """Tied, frozen, unused, empty, one-element and zero-dimensional parameters beside the usual ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(23, 16)
        self.blocks = nn.ModuleList([Block(16, 2) for _ in range(2)])
        self.conv = nn.Conv1d(16, 12, 3)
        self.wide = nn.Linear(12, 16)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embed.weight
        self.never = nn.Linear(3, 5)
        self.one = nn.Parameter(torch.ones(1))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.ones(0, 5))
        self.blocks[1].fc.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.wide(self.conv(x.transpose(1, 2)).transpose(1, 2)) * self.one + self.scalar + self.empty.sum()
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens[:, 2:].flatten())


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups with different settings; frozen parameters are among them."""
    named = dict(model.named_parameters())
    slow = [param for name, param in named.items() if "1" in name or param.dim() == 1]
    fast = [param for param in named.values() if not any(param is other for other in slow)]
    return [{"params": fast}, {"params": slow, "lr": 0.002}]


def tokens_of(index: int) -> Tensor:
    """Return global micro-batch ``index``."""
    return torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(index))
