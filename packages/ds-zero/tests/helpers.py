"""What several test files need: a training run on one rank, and its state put together again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import ds_zero
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Transformer, micro_batch, seeded
from ds_testkit.state import Exported, State, assembled, exported
from ds_zero import links
from ds_zero.host import HostCollectives
from ds_zero.kernels import TorchKernels


class Run(NamedTuple):
    """How to train."""

    stage: int = 3
    num_micro_batches: int = 4  # over all ranks, per step
    steps: int = 8
    compute: torch.dtype | None = None
    clip: float | None = 0.3
    optimizer: str = "AdamW"
    model: dict[str, Any] = {}
    settings: dict[str, Any] = {}  # of ZeroConfig, further ones


class Result(NamedTuple):
    """What came out on one rank."""

    losses: list[list[float]]  # per step, this rank's micro-batches in order
    norms: list[float]
    pieces: list[Exported]
    memory: ds_zero.MemoryReport


def make_optimizer(name: str) -> Any:
    # a large eps keeps the update a smooth function of the gradient: some gradients are zero but for rounding
    settings: dict[str, Any] = {"AdamW": {"weight_decay": 0.1, "eps": 1e-3}, "RMSprop": {"eps": 1e-3}}.get(name, {})
    if name == "Adagrad":
        settings = {"initial_accumulator_value": 1e-3}
    return lambda groups: getattr(torch.optim, name)(groups, lr=1e-2, **settings)


def build(rank: Rank, run: Run) -> tuple[Transformer, ds_zero.Sharded]:
    model = seeded(**run.model)
    sharded = ds_zero.shard(
        model,
        make_optimizer(run.optimizer),
        config=ds_zero.ZeroConfig(stage=run.stage, **run.settings),
        group=rank.group,
        precision=ds_zero.Precision(compute=run.compute),
    )
    return model, sharded


def train_steps(
    rank: Rank, run: Run, model: Transformer, sharded: ds_zero.Sharded, steps: Iterable[int]
) -> tuple[list[list[float]], list[float]]:
    """Train; accumulation step i of this rank is micro-batch ``i * size + rank`` of the step."""
    losses, norms = [], []
    for step in steps:
        losses.append([])
        for index in range(rank.rank, run.num_micro_batches, rank.size):
            loss = model(micro_batch(step * run.num_micro_batches + index))
            loss.backward()
            losses[-1].append(loss.item())
        norm = sharded.grad_norm().value
        norms.append(norm)
        sharded.step(1.0 if run.clip is None else min(1.0, run.clip / norm))
    return losses, norms


def train(rank: Rank, run: Run) -> Result:
    """Train from scratch on one rank of a pool."""
    model, sharded = build(rank, run)
    losses, norms = train_steps(rank, run, model, sharded, range(run.steps))
    return Result(losses, norms, exported(sharded), sharded.memory())


def assemble_run(ranks: RankPool, run: Run, size: int) -> State:
    """Train on ``size`` ranks and return the whole state."""
    return assembled(result.pieces for result in ranks.run(train, run, size=size))


def join(rank: Rank, *, timeout: float = 60.0) -> HostCollectives:
    """Connect the ranks of one host anew, with a timeout of its own."""
    connected = links.connect(rank.group, range(rank.size), 30.0)
    assert connected is not None
    return HostCollectives(rank.group, range(rank.size), connected, TorchKernels(), timeout)
