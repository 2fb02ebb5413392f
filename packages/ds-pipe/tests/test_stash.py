"""A described model with tied layers and stashes has, on several ranks, the bits of the model in one piece."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from ds_pipe import Costs, Pipeline, PipelineModule, Schedule, make_greedy_schedule, make_schedule
from ds_pipe.handing import Handed
from ds_pipe.layers import LayerSpec, TiedLayerSpec
from ds_pipe.measure import measure_costs
from ds_pipe.stash import Pop, Stash
from ds_testkit import Rank, RankPool
from torch import Tensor, nn
from torch.nn import functional

WORDS, WIDTH, MICRO_BATCHES, STEPS = 13, 8, 4, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        return value + functional.gelu(self.linear(self.norm(value)))


def gated(value: Tensor, kept: Tensor) -> Tensor:
    return value * kept.tanh() + kept


def logits(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, embedding.weight)


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, -2), target.flatten())


def model_of(interval: int = 0) -> PipelineModule:
    embed = TiedLayerSpec("words", nn.Embedding, WORDS, WIDTH)
    head = TiedLayerSpec("words", nn.Embedding, WORDS, WIDTH, forward_fn=logits)
    block = LayerSpec(Block)
    layers = [
        embed,
        Stash("a"),
        block,
        Stash("b"),
        block,
        block,
        Pop("b", gated),
        block,
        Pop("a", torch.add),
        block,
        head,
    ]
    return PipelineModule(layers, loss_fn=loss_of, partition_method="uniform", activation_checkpoint_interval=interval)


def micro_batches(step: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    made = [torch.randint(0, WORDS, (2, 6 + step), generator=generator) for _ in range(MICRO_BATCHES)]
    return [tokens[:, :-1] for tokens in made], [tokens[:, 1:] for tokens in made]


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def train_whole() -> Trained:
    model = model_of()
    whole = model.build(0, model.num_layers)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        for tokens, target in zip(*micro_batches(step), strict=True):
            loss = loss_of(whole(tokens), target)
            (loss * (1 / MICRO_BATCHES)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, {name: weight.detach() for name, weight in whole.named_parameters()})


def train_in_pipeline(rank: Rank, schedule: Schedule, interval: int) -> Trained:
    model = model_of(interval)
    bounds = model.bounds(schedule.num_stages)
    loans = model.loans(bounds)
    stages = {
        stage: model.build(
            bounds[stage], bounds[stage + 1], borrows={loan.key: loan.skip for loan in loans if loan.target == stage}
        )
        for stage in schedule.stages_of(rank.rank)
    }
    lends = {loan.skip: stages[loan.source].get_parameter(loan.weight) for loan in loans if loan.source in stages}
    pipeline = Pipeline(schedule, stages, rank.group, loss=loss_of, lends=lends)
    trained = [param for stage in stages.values() for param in stage.parameters()]
    optimizer = torch.optim.AdamW(trained or [torch.zeros(1)], lr=0.1)  # there are ranks with a Stash only
    losses = []
    for step in range(STEPS):
        losses += [loss.item() for loss in pipeline.run(*micro_batches(step))]
        optimizer.step()
        optimizer.zero_grad()
    named = [pair for stage in stages.values() for pair in stage.named_parameters()]
    return Trained(losses, {name: weight.detach() for name, weight in named})


NAMES = [("gpipe", 1), ("1f1b", 1), ("zb_h1", 1), ("interleaved", 2), ("looped_bfs", 2), ("zb_v", 2), ("greedy", 2)]


@pytest.mark.rung_c
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("name", "num_chunks"), NAMES)
def test_bits_are_those_of_the_model_in_one_piece(ranks: RankPool, name: str, num_chunks: int, num_ranks: int) -> None:
    model, num_stages = model_of(), num_ranks * num_chunks
    skips = model.skips(model.bounds(num_stages))
    assert [skip.name for skip in skips] == [f"words@{num_stages - 1}", "a", "b"]
    sizes = {"num_ranks": num_ranks, "num_micro_batches": MICRO_BATCHES}
    if name == "greedy":
        schedule = make_greedy_schedule(Costs.uniform(num_stages, latency=0.3), skips=skips, **sizes)
    else:
        chunks = num_chunks if num_chunks > 1 else None
        schedule = make_schedule(name, num_chunks=chunks, skips=skips, **sizes)
    found: list[Trained] = ranks.run(train_in_pipeline, schedule, num_chunks - 1, size=num_ranks)
    want = train_whole()
    assert [loss for rank in found for loss in rank.losses] == want.losses
    weights = {name: value for rank in found for name, value in rank.weights.items()}
    assert weights.keys() == want.weights.keys()
    for key, value in want.weights.items():
        assert torch.equal(weights[key], value), key


def test_parts_hand_out_and_take() -> None:
    layers = [
        Stash("a"),
        nn.ReLU(),
        Stash("b"),
        nn.Tanh(),
        Pop("a"),
        lambda pair: pair[0] + pair[1],
        Pop("b", torch.mul),
    ]
    model = PipelineModule(layers)
    value = torch.tensor([-1.0, 2.0])
    whole = model.build(0, 7)(value)
    assert torch.equal(whole, (value.relu().tanh() + value) * value.relu())
    first = model.build(0, 4)(value)
    assert isinstance(first, Handed)
    assert list(first.skips) == ["a", "b"]
    middle, last = model.build(4, 6), model.build(6, 7)
    assert torch.equal(last(middle(first.out, skips={"a": first.skips["a"]}), skips={"b": first.skips["b"]}), whole)
    with pytest.raises(ValueError, match=r"the part takes the skips \['a'\]; got \[\]"):
        middle(first.out)


def test_stashes_are_no_skips_within_a_stage() -> None:
    model = model_of()
    assert [str(skip) for skip in model.skips([0, 11])] == []
    assert [str(skip) for skip in model.skips([0, 1, 7, 11])] == ["0=2:words@2", "1>2:a"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Stash("a"), nn.ReLU()], "'a', and that comes later; got Stash as layers [0], Pop as layers []"),
        ([Pop("a"), nn.ReLU()], "got Stash as layers [], Pop as layers [0]"),
        ([Pop("a"), Stash("a")], "got Stash as layers [1], Pop as layers [0]"),
        ([Stash("a"), Pop("a"), Pop("a")], "got Stash as layers [0], Pop as layers [1, 2]"),
        ([Stash("a"), Stash("a"), Pop("a")], "got Stash as layers [0, 1], Pop as layers [2]"),
    ],
)
def test_stashes_that_are_not_popped(layers: list[object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PipelineModule(layers)
    assert message in str(caught.value)


def test_layers_with_stashes_are_measured() -> None:
    inputs, targets = micro_batches(0)
    costs = measure_costs(model_of(), inputs[0], targets[0], repeats=1)
    assert costs.num_stages == 11
    assert costs.message_bytes[1:] == 10 * (inputs[0].numel() * WIDTH * 4.0,)
