"""A model trained in a pipeline has the bits of the same model trained without one."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from ds_pipe import Pipeline, Schedule, make_greedy_schedule, make_schedule
from ds_pipe.alarm import PipelineError
from ds_pipe.costs import Costs
from ds_testkit import Rank, RankPool
from torch import Tensor, nn
from torch.nn import functional

pytestmark = pytest.mark.rung_c

WIDTH, LAYERS, MICRO_BATCHES = 8, 8, 4


class Block(nn.Module):
    """A residual block, with a norm that takes and gives a tuple: hidden states, and a counter that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, value: tuple[Tensor, int]) -> tuple[Tensor, int]:
        hidden, count = value
        return hidden + self.second(functional.gelu(self.first(self.norm(hidden)))), count + 1


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        return self.table(tokens), 0


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, value: tuple[Tensor, int]) -> Tensor:
        assert value[1] == LAYERS - 2
        return self.head(value[0])


def layers() -> list[nn.Module]:
    torch.manual_seed(3)
    return [First(), *(Block() for _ in range(LAYERS - 2)), Last()]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, -2), target.flatten())


def micro_batches(step: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    # lengths change from step to step, and within the second one
    lengths = [5 + step + (step == 1) * index for index in range(MICRO_BATCHES)]
    made = [torch.randint(0, 11, (2, length + 1), generator=generator) for length in lengths]
    return [tokens[:, :-1] for tokens in made], [tokens[:, 1:] for tokens in made]


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def train_whole() -> Trained:
    model = nn.Sequential(*layers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        for tokens, target in zip(*micro_batches(step), strict=True):
            loss = loss_of(model(tokens), target)
            (loss * (1 / MICRO_BATCHES)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, dict(model.named_parameters()))


def train_in_pipeline(rank: Rank, schedule: Schedule) -> Trained:
    parts = dict(enumerate(layers()))
    per_stage = LAYERS // schedule.num_stages
    stages = {
        stage: nn.Sequential(*(parts[stage * per_stage + offset] for offset in range(per_stage)))
        for stage in schedule.stages_of(rank.rank)
    }
    pipeline = Pipeline(schedule, stages, rank.group, loss=loss_of)
    optimizer = torch.optim.AdamW([p for stage in stages.values() for p in stage.parameters()], lr=0.1)
    losses = []
    for step in range(3):
        losses += [loss.item() for loss in pipeline.run(*micro_batches(step))]
        optimizer.step()
        optimizer.zero_grad()
    named = {
        f"{stage * per_stage + int(name.partition('.')[0])}.{name.partition('.')[2]}": param.detach()
        for stage, module in stages.items()
        for name, param in module.named_parameters()
    }
    return Trained(losses, named)


NAMES = [("gpipe", None), ("1f1b", None), ("zb_h1", None), ("interleaved", 2), ("looped_bfs", 2), ("zb_v", None)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("name", "num_chunks"), [*NAMES, ("greedy", 2)])
def test_bits_are_those_without_a_pipeline(ranks: RankPool, name: str, num_chunks: int | None, num_ranks: int) -> None:
    sizes = {"num_ranks": num_ranks, "num_micro_batches": MICRO_BATCHES}
    if name == "greedy":
        schedule = make_greedy_schedule(Costs.uniform(2 * num_ranks, latency=0.3), **sizes)
    else:
        schedule = make_schedule(name, num_chunks=num_chunks, **sizes)
    want = train_whole()
    found: list[Trained] = ranks.run(train_in_pipeline, schedule, size=num_ranks)
    assert [loss for rank in found for loss in rank.losses] == want.losses
    weights = {name: value for rank in found for name, value in rank.weights.items()}
    assert weights.keys() == want.weights.keys()
    for key, value in want.weights.items():
        assert torch.equal(weights[key], value), key


def evaluate(rank: Rank, schedule: Schedule) -> list[Any]:
    stages = {rank.rank: nn.Sequential(*layers()[rank.rank * 4 : rank.rank * 4 + 4])}
    return Pipeline(schedule, stages, rank.group).run(micro_batches(1)[0])


def test_outputs_of_an_evaluation(ranks: RankPool) -> None:
    schedule = make_schedule("forward_only", num_ranks=2, num_micro_batches=MICRO_BATCHES)
    first, last = ranks.run(evaluate, schedule, size=2)
    assert first == []
    with torch.no_grad():
        model = nn.Sequential(*layers())
        for out, tokens in zip(last, micro_batches(1)[0], strict=True):
            assert torch.equal(out, model(tokens))


class Broken(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        raise RuntimeError("no such luck")


def test_a_stage_that_raises_is_named() -> None:
    schedule = make_schedule("gpipe", num_ranks=1, num_micro_batches=1)
    with pytest.raises(PipelineError, match=r"rank 0 failed at instruction 1 of 6, F0.0: RuntimeError: no such luck"):
        Pipeline(schedule, {0: Broken()}, None, loss=loss_of).run([torch.ones(1)], [torch.ones(1)])


def test_parts_that_do_not_fit() -> None:
    schedule = make_schedule("1f1b", num_ranks=1, num_micro_batches=2)
    with pytest.raises(ValueError, match=r"rank 0 of 1 has the stages \[0, 1\]; .* this one has \[0\]"):
        Pipeline(schedule, {0: Broken(), 1: Broken()}, None, loss=loss_of)
    with pytest.raises(ValueError, match="rank 0 has the last stage, 0: it needs the loss"):
        Pipeline(schedule, {0: Broken()}, None)
    pipeline = Pipeline(schedule, {0: Broken()}, None, loss=loss_of)
    with pytest.raises(ValueError, match="the first stage needs 2 micro-batches; got 1"):
        pipeline.run([torch.ones(1)], [torch.ones(1)])
    with pytest.raises(ValueError, match="the last stage needs 2 targets; got 0"):
        pipeline.run([torch.ones(1)] * 2)
