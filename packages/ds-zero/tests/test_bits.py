"""The promise: the same bits on 1, 2 and 4 ranks, at every stage, and as a plain loop that adds along the tree."""

from __future__ import annotations

import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import assembled, assert_same_bits
from torch import Tensor

from .helpers import Run, make_optimizer, train

pytestmark = pytest.mark.rung_c

SIZES, STAGES = (1, 2, 4), (0, 1, 2, 3)


@pytest.mark.parametrize("num_micro_batches", [4, 8])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_for_every_size_and_stage(
    ranks: RankPool, compute: torch.dtype | None, num_micro_batches: int
) -> None:
    run = Run(num_micro_batches=num_micro_batches, compute=compute)
    reference = ranks.run(train, run._replace(stage=0), size=1)
    want = assembled(result.pieces for result in reference)
    assert {role for role, _ in want} == {"param", "exp_avg", "exp_avg_sq"}
    assert min(reference[0].norms) > run.clip, "the test is about runs in which clipping acts"
    for stage in STAGES:
        for size in SIZES:
            results = ranks.run(train, run._replace(stage=stage), size=size)
            assert_same_bits(assembled(result.pieces for result in results), want)
            assert all(result.norms == reference[0].norms for result in results)
            losses = [
                [results[index % size].losses[step][index // size] for index in range(num_micro_batches)]
                for step in range(run.steps)
            ]
            assert losses == reference[0].losses


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_as_a_plain_loop(ranks: RankPool, compute: torch.dtype) -> None:
    """The reference has no flat buffer, no shard, no hook: only torch and the order of additions."""
    run = Run(num_micro_batches=4, compute=compute, clip=None)
    (want,) = ranks.run(plain_loop, run, size=1)
    results = ranks.run(train, run, size=2)
    got = assembled(result.pieces for result in results)
    assert_same_bits({key: value.view_as(want[key]) for key, value in got.items()}, want)


def plain_loop(_rank: Rank, run: Run) -> dict[tuple[str, str], Tensor]:
    model = seeded()
    masters = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    optimizer = make_optimizer("AdamW")(masters.values())
    model.to(run.compute)
    for step in range(run.steps):
        leaves = []
        for index in range(run.num_micro_batches):
            grads = torch.autograd.grad(model(micro_batch(step * run.num_micro_batches + index)), model.parameters())
            leaves.append([grad.float() for grad in grads])
        sums = [(a + b) + (c + d) for a, b, c, d in zip(*leaves, strict=True)]
        for master, total in zip(masters.values(), sums, strict=True):
            master.grad = total * (1.0 / run.num_micro_batches)
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(model.parameters(), masters.values(), strict=True):
                param.copy_(master)
    want = {("param", name): master.detach() for name, master in masters.items()}
    for name, master in masters.items():
        want |= {(role, name): optimizer.state[master][role] for role in ("exp_avg", "exp_avg_sq")}
    return want
