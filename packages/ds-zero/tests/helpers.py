"""What several test files need: a training run on one rank, and its state put together again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import ds_zero
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Transformer, micro_batch, seeded
from torch import Tensor


class Run(NamedTuple):
    """How to train."""

    stage: int = 3
    num_micro_batches: int = 4  # over all ranks, per step
    steps: int = 8
    compute: torch.dtype | None = None
    clip: float | None = 0.3
    optimizer: str = "AdamW"
    model: dict[str, Any] = {}


class Result(NamedTuple):
    """What came out on one rank."""

    losses: list[list[float]]  # per step, this rank's micro-batches in order
    norms: list[float]
    pieces: list[tuple[str, str, torch.Size, int, Tensor]]
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
        config=ds_zero.ZeroConfig(stage=run.stage),
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


def exported(sharded: ds_zero.Sharded) -> list[tuple[str, str, torch.Size, int, Tensor]]:
    return [(p.name, p.role, p.shape, p.start, p.data.clone()) for p in sharded.state().pieces]


def assembled(ranks: Iterable[Iterable[tuple[str, str, torch.Size, int, Tensor]]]) -> dict[tuple[str, str], Tensor]:
    """Put the pieces of all ranks together; every element has to stand exactly once."""
    whole: dict[tuple[str, str], Tensor] = {}
    counts: dict[tuple[str, str], Tensor] = {}
    for pieces in ranks:
        for name, role, shape, start, data in pieces:
            key = (role, name)
            whole.setdefault(key, torch.zeros(shape.numel(), dtype=data.dtype))[start : start + data.numel()] = data
            counts.setdefault(key, torch.zeros(shape.numel(), dtype=torch.int))[start : start + data.numel()] += 1
    for key, count in counts.items():
        assert bool((count == 1).all()), f"{key}: elements missing or doubled"
    return whole


def assert_same_bits(got: dict[tuple[str, str], Tensor], want: dict[tuple[str, str], Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [key for key in want if not torch.equal(got[key], want[key])]
    assert not different, f"not equal bit for bit: {different}"


def assemble_run(ranks: RankPool, run: Run, size: int) -> dict[tuple[str, str], Tensor]:
    """Train on ``size`` ranks and return the whole state."""
    return assembled(result.pieces for result in ranks.run(train, run, size=size))
