"""Parity with a plain, unsharded torch loop after every step: loss, gradients, parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import assembled, copied, exported
from torch import Tensor, nn

from .helpers import Run, build, make_optimizer

pytestmark = pytest.mark.rung_c

Recorded = list[tuple[list[float], list[Any], list[Any], float]]


def record(rank: Rank, run: Run) -> Recorded:
    """Train, and keep losses, gradient pieces, parameter pieces and norm of every step."""
    model, sharded = build(rank, run)
    steps = []
    for step in range(run.steps):
        losses = []
        for index in range(rank.rank, run.num_micro_batches, rank.size):
            loss = model(micro_batch(step * run.num_micro_batches + index))
            loss.backward()
            losses.append(loss.item())
        grads = copied(sharded.gradients())
        norm = sharded.grad_norm().value
        sharded.step(min(1.0, run.clip / (norm + 1e-6)) if run.clip else 1.0)
        params = exported(sharded)
        steps.append((losses, grads, params, norm))
    return steps


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_a_plain_loop_after_every_step(ranks: RankPool, stage: int, optimizer: str) -> None:
    """The yardstick is float64: sharded float32 may err at most twice as much as plain float32 does."""
    run = Run(stage=stage, steps=6, num_micro_batches=4, optimizer=optimizer)
    recorded: list[Recorded] = ranks.run(record, run, size=2)
    plain, exact = Plain(run, torch.float32), Plain(run, torch.float64)
    for step in range(run.steps):
        for loop in (plain, exact):
            loop.step(step)
        losses = [recorded[index % 2][step][0][index // 2] for index in range(run.num_micro_batches)]
        _check(torch.tensor(losses), plain.losses, exact.losses)
        sums = assembled(rank_steps[step][1] for rank_steps in recorded)
        grads = torch.cat([sums["grad", name] / run.num_micro_batches for name in plain.names])
        _check(grads, plain.grads, exact.grads)
        _check(torch.tensor([recorded[0][step][3]]), plain.norm, exact.norm)
        state = assembled(rank_steps[step][2] for rank_steps in recorded)
        _check(torch.cat([state["param", name] for name in plain.names]), plain.params(), exact.params())


class Plain:
    """The loop everybody writes, on one process."""

    def __init__(self, run: Run, dtype: torch.dtype) -> None:
        self._run = run
        self._model = seeded().to(dtype)
        self._optimizer = make_optimizer(run.optimizer)(self._model.parameters())
        self.names = [name for name, _ in self._model.named_parameters()]

    def step(self, step: int) -> None:
        count = self._run.num_micro_batches
        losses = torch.stack([self._model(micro_batch(step * count + index)) for index in range(count)])
        losses.mean().backward()
        self.losses = losses.detach()
        self.grads = torch.cat([p.grad.flatten() for p in self._model.parameters() if p.grad is not None])
        self.norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._run.clip or 1e9).reshape(1)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def params(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self._model.parameters()])


def _check(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Compare errors in the largest element; one ulp of the largest value is always allowed."""
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    error, plain_error = (got - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * plain_error + ulp, f"{error:.2e} against plain torch's {plain_error:.2e}"
