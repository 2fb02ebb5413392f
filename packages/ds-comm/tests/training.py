"""Two tensors in two groups, their gradients, and a plain loop on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ds_comm.codecs import BlockCodec
from ds_comm.optim import CompressedAdam, Link, LocalSteps, OneBitAdam, OneBitLamb, ZeroOneAdam
from ds_testkit import Rank
from torch import Tensor, nn

SHAPES = ((20, 20), (37,), (3, 11))
GROUPS = ((0,), (1, 2))
NUMEL = 470
HYPER: tuple[dict[str, Any], ...] = (
    {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"lr": 0.05, "betas": (0.8, 0.99), "weight_decay": 0.0},
)
EPS = 1e-4

CODES = {
    "OneBitAdam": "ternary",
    "OneBitLamb": "ternary",
    "ZeroOneAdam": "sign",
    "CompressedAdam": "int4",
    "LocalSteps": "int4",
}
"""The optimizers, and the code each is tested with, in blocks of 64."""

SETTINGS: dict[str, dict[str, Any]] = {
    "OneBitAdam": {"freeze_step": 5},
    "OneBitLamb": {"freeze_step": 5},
    "ZeroOneAdam": {"var_freeze_step": 8, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 4},
    "CompressedAdam": {},
    "LocalSteps": {"every": 3},
}


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def noise(worker: int, step: int) -> Tensor:
    """Different for each worker, with a part that all share; magnitudes differ widely."""
    drawn = [
        torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed)) for seed in (step, 1000 * worker + 500 + step)
    ]
    return (drawn[0] + 0.5 * drawn[1]) * torch.logspace(-1, 1, NUMEL)


def gradient(worker: int, step: int, p: Any) -> Any:
    """Of NumPy's or torch's kind, like ``p``."""
    fixed = noise(worker, step)
    return 0.3 * p + (fixed.double().numpy() if isinstance(p, np.ndarray) else fixed)


def make(
    name: str, params: list[nn.Parameter], link: Link, *, around: tuple[int, int] = (0, 0), **settings: Any
) -> torch.optim.Optimizer:
    """An optimizer; ``around``: how many groups without parameters come before the others and after."""
    codec = BlockCodec(code=CODES[name], block=64)
    groups = [{"params": [params[i] for i in group], **hyper} for group, hyper in zip(GROUPS, HYPER, strict=True)]
    before, after = ([{**groups[0], "params": []} for _ in range(count)] for count in around)
    groups = [*before, *groups, *after]
    settings = {**SETTINGS[name], "codec": codec, "link": link, **settings}
    if name == "LocalSteps":
        plain = [{"params": group["params"], "lr": group["lr"]} for group in groups]
        return LocalSteps(torch.optim.SGD(plain), **settings)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "OneBitAdam": OneBitAdam,
        "OneBitLamb": OneBitLamb,
        "ZeroOneAdam": ZeroOneAdam,
        "CompressedAdam": CompressedAdam,
    }
    return kinds[name](groups, eps=EPS, **settings)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(each) for each in start()]


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([param.detach().view(-1) for param in params])


def set_gradients(params: list[nn.Parameter], worker: int, step: int) -> None:
    whole = gradient(worker, step, flat(params))
    for param, part in zip(params, whole.split([param.numel() for param in params]), strict=True):
        param.grad = part.view(param.shape).clone()


def train(rank: Rank, name: str, steps: int, settings: dict[str, Any]) -> list[Tensor]:
    """Parameters after each step."""
    params = parameters()
    optimizer = make(name, params, Link(group=rank.group), **settings)
    seen = []
    for step in range(1, steps + 1):
        set_gradients(params, rank.rank, step)
        optimizer.step()
        seen.append(flat(params))
    return seen
