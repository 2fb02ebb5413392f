"""Shapes may change at any time: within a step, in one direction only, and whatever the order of taking."""

from __future__ import annotations

import torch
from ds_pipe import Pipeline, Schedule, validate
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

# rank 1 takes the micro-batches in another order than they are sent
SCHEDULE = """schedule mixed placement 0,1 micro_batches 3
0: F0.0 SEND:x1.0>1 F0.1 SEND:x1.1>1 F0.2 SEND:x1.2>1 RECV:g0.2<1 B0.2 RECV:g0.0<1 B0.0 RECV:g0.1<1 B0.1 REDUCE0 OPT
1: RECV:x1.0<0 RECV:x1.1<0 RECV:x1.2<0 F1.2 B1.2 SEND:g0.2>0 F1.0 B1.0 SEND:g0.0>0 F1.1 B1.1 SEND:g0.1>0 REDUCE1 OPT"""
ORDER = (2, 0, 1)
LENGTHS = [(3, 3, 3), (3, 5, 3), (3, 5, 5), (7, 3, 1), (2, 2, 4), (2, 2, 4)]  # by step and micro-batch


class First(nn.Module):
    """Hands on a hidden state, whose gradient comes back, and a mask, whose shape may change for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        hidden, mask = value
        return {"hidden": self.linear(hidden), "mask": mask}


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: dict[str, Tensor]) -> Tensor:
        return self.linear(value["hidden"]).sum() * value["mask"].sum()


def models() -> list[nn.Module]:
    torch.manual_seed(1)
    return [First(), Second()]


def batch(step: int, both_ways: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(length if both_ways else 2, 4, generator=generator), torch.randn(length, generator=generator))
        for length in LENGTHS[step]
    ]


def loss_of(out: Tensor, _target: int) -> Tensor:
    return out


def train(rank: Rank, both_ways: bool) -> list[list[Tensor]]:
    own = models()[rank.rank]
    pipeline = Pipeline(Schedule.parse(SCHEDULE), {rank.rank: own}, rank.group, loss=loss_of)
    found = []
    for step in range(len(LENGTHS)):
        pipeline.run(batch(step, both_ways), [0] * 3)
        found.append([param.grad.clone() for param in own.parameters() if param.grad is not None])
        own.zero_grad()
    return found


def test_shapes_that_change_keep_the_bits(ranks: RankPool) -> None:
    validate(Schedule.parse(SCHEDULE))
    for both_ways in (False, True):
        found = ranks.run(train, both_ways, size=2)
        first, second = models()
        for step in range(len(LENGTHS)):
            given = batch(step, both_ways)
            for index in ORDER:
                (second(first(given[index])) * (1 / 3)).backward()
            for model, grads in zip((first, second), found, strict=True):
                want = [param.grad for param in model.parameters()]
                assert all(torch.equal(a, b) for a, b in zip(grads[step], want, strict=True)), (step, both_ways)
                model.zero_grad()
