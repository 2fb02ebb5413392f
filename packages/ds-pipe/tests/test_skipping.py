"""Models with skips and tied weights have, in a pipeline, the bits they have without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from ds_pipe import Costs, Pipeline, Schedule, make_greedy_schedule, make_schedule
from ds_pipe.handing import Borrower, Handed
from ds_pipe.skips import Skip
from ds_testkit import Rank, RankPool
from torch import Tensor, nn
from torch.nn import functional

pytestmark = pytest.mark.rung_c

WORDS, WIDTH, LAYERS, MICRO_BATCHES, STEPS = 13, 8, 8, 4, 3


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        return value + functional.gelu(self.linear(self.norm(value)))


class Lookup(Block):
    """A block that uses the table, too."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + self.keys(value).mean(-1, keepdim=True)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.words = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.words(self.norm(value))


class Down(Block):
    """Hands its input to the layer that mirrors it."""


class Up(Block):
    """Adds what that layer handed out, in two ways."""


class Kind(NamedTuple):
    """A model: its layers, and what of them is tied or skipped."""

    layers: tuple[type[nn.Module], ...]
    tied: Mapping[int, str] = {}  # by layer, the name of the weight that is the table
    dtype: torch.dtype = torch.float32


TIED = Kind((Embed, *(LAYERS - 2) * (Block,), Head), {LAYERS - 1: "words.weight"})
HALF = TIED._replace(dtype=torch.bfloat16)
FOURFOLD = Kind(  # in a row of four stages each has one use: the order of the sums counts
    (Embed, Block, Lookup, Block, Block, Lookup, Block, Head),
    {2: "keys.weight", 5: "keys.weight", LAYERS - 1: "words.weight"},
)
UNET = Kind((Embed, Down, Down, Down, Up, Up, Up, Head))
BOTH = UNET._replace(tied={LAYERS - 1: "words.weight"})


def layers_of(kind: Kind) -> list[nn.Module]:
    torch.manual_seed(3)
    return [layer().to(kind.dtype) for layer in kind.layers]


class Part(nn.Module):
    """Some of the layers; what goes past its end it hands out, what comes past its beginning it takes."""

    def __init__(self, layers: list[nn.Module], first: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(first + index): layer for index, layer in enumerate(layers)})
        self.last = first + len(layers) - 1

    def forward(self, value: Tensor, skips: Mapping[str, Tensor] | None = None) -> Any:
        there = dict(skips or {})
        for name, layer in self.layers.items():
            if isinstance(layer, Down):
                there[f"to.{LAYERS - 1 - int(name)}"] = value.view_as(value)
            if isinstance(layer, Up):
                skip = there.pop(f"to.{name}")
                value = layer(value + skip) * (1 + skip.tanh())
            else:
                value = layer(value)
        return Handed(value, there) if there else value


def skips_of(kind: Kind, per_stage: int) -> list[Skip]:
    found = [
        Skip(index // per_stage, (LAYERS - 1 - index) // per_stage, f"to.{LAYERS - 1 - index}")
        for index, layer in enumerate(kind.layers)
        if layer is Down
    ]
    found += [Skip(0, layer // per_stage, f"tied.{layer}", constant=True) for layer in kind.tied]
    return [skip for skip in found if skip.source != skip.target]


def micro_batches(step: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    made = [torch.randint(0, WORDS, (2, 6 + step), generator=generator) for _ in range(MICRO_BATCHES)]
    return [tokens[:, :-1] for tokens in made], [tokens[:, 1:] for tokens in made]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, -2).float(), target.flatten())


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def tie(parts: list[nn.Module], kind: Kind, layers: list[int]) -> None:
    for layer in layers:
        inner, _, name = kind.tied[layer].rpartition(".")
        setattr(parts[layer].get_submodule(inner), name, parts[0].table.weight)


def train_whole(kind: Kind) -> Trained:
    parts = layers_of(kind)
    tie(parts, kind, list(kind.tied))
    model = Part(parts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        for tokens, target in zip(*micro_batches(step), strict=True):
            loss = loss_of(model(tokens), target)
            (loss * (1 / MICRO_BATCHES)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, {name: value.detach() for name, value in model.named_parameters()})


def stages_of(kind: Kind, schedule: Schedule, rank: int) -> tuple[dict[int, nn.Module], dict[str, Tensor]]:
    parts, per_stage = layers_of(kind), LAYERS // schedule.num_stages
    tie(parts, kind, [layer for layer in kind.tied if layer < per_stage])
    stages: dict[int, nn.Module] = {}
    for stage in schedule.stages_of(rank):
        start = stage * per_stage
        stages[stage] = Part(parts[start : start + per_stage], start)
        borrowed = {f"layers.{k}.{kind.tied[k]}": f"tied.{k}" for k in kind.tied if 0 < start <= k < start + per_stage}
        if borrowed:
            stages[stage] = Borrower(stages[stage], borrowed)
    lends = [skip.name for skip in schedule.skips if skip.constant and skip.source in stages]
    return stages, dict.fromkeys(lends, parts[0].table.weight)


def train_in_pipeline(rank: Rank, kind: Kind, schedule: Schedule, sharded: bool) -> Trained:
    stages, lends = stages_of(kind, schedule, rank.rank)
    parameters = Vanishing(stages) if sharded else None
    pipeline = Pipeline(schedule, stages, rank.group, loss=loss_of, lends=lends, parameters=parameters)
    trained = [param for stage in stages.values() for param in stage.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for step in range(STEPS):
        losses += [loss.item() for loss in pipeline.run(*micro_batches(step))]
        with parameters.all_there() if parameters else torch.no_grad():
            optimizer.step()
        optimizer.zero_grad()
    named = [pair for stage in stages.values() for pair in stage.named_parameters()]
    if parameters:
        parameters.restore()
    return Trained(losses, {name.removeprefix("module."): value.detach() for name, value in named})


class Vanishing:
    """Parameters that are there between UNSHARD and RESHARD only, as sharded ones are."""

    def __init__(self, stages: Mapping[int, nn.Module]) -> None:
        self.whole = {stage: {p: p.detach().clone() for p in module.parameters()} for stage, module in stages.items()}
        for stage in stages:
            self.reshard(stage)

    def unshard(self, stage: int) -> None:
        for param, value in self.whole[stage].items():
            param.data.copy_(value)

    def reshard(self, stage: int) -> None:
        for param in self.whole[stage]:
            param.data.fill_(float("nan"))

    def reduce(self, stage: int) -> None:
        """They are on one rank each."""

    def restore(self) -> None:
        for stage in self.whole:
            self.unshard(stage)

    def all_there(self) -> Any:
        return _There(self)


class _There:
    def __init__(self, parameters: Vanishing) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        self.parameters.restore()

    def __exit__(self, *_: object) -> None:
        for stage, values in self.parameters.whole.items():
            for param in values:
                values[param] = param.detach().clone()
            self.parameters.reshard(stage)


NAMES = [
    ("gpipe", None),
    ("1f1b", None),
    ("zb_h1", None),
    ("interleaved", 2),
    ("looped_bfs", 2),
    ("zb_v", None),
    ("greedy", 2),
]


def schedule_of(kind: Kind, name: str, num_chunks: int | None, num_ranks: int) -> Schedule:
    num_stages = num_ranks * {"zb_v": 2}.get(name, num_chunks or 1)
    skips = skips_of(kind, LAYERS // num_stages)
    sizes = {"num_ranks": num_ranks, "num_micro_batches": MICRO_BATCHES}
    if name == "greedy":
        return make_greedy_schedule(Costs.uniform(num_stages, latency=0.3), skips=skips, **sizes)
    return make_schedule(name, num_chunks=num_chunks, skips=skips, **sizes)


def check(ranks: RankPool, kind: Kind, schedule: Schedule, sharded: bool = False) -> None:
    want = train_whole(kind)
    found: list[Trained] = ranks.run(train_in_pipeline, kind, schedule, sharded, size=schedule.num_ranks)
    assert [loss for rank in found for loss in rank.losses] == want.losses
    weights = {name: value for rank in found for name, value in rank.weights.items()}
    assert weights.keys() == want.weights.keys()
    for key, value in want.weights.items():
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("name", "num_chunks"), NAMES)
def test_bits_of_skips_and_a_tied_weight(ranks: RankPool, name: str, num_chunks: int | None, num_ranks: int) -> None:
    check(ranks, BOTH, schedule_of(BOTH, name, num_chunks, num_ranks))


@pytest.mark.parametrize(("name", "num_chunks"), [("1f1b", None), ("zb_v", None)])
@pytest.mark.parametrize("kind", [TIED, HALF, FOURFOLD, UNET])
def test_bits_of_other_models(ranks: RankPool, kind: Kind, name: str, num_chunks: int | None) -> None:
    check(ranks, kind, schedule_of(kind, name, num_chunks, 2))


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_what_is_lent_outlives_the_parameters_of_its_owner(ranks: RankPool, name: str) -> None:
    check(ranks, BOTH, schedule_of(BOTH, name, None, 2), sharded=True)


def evaluate(rank: Rank, schedule: Schedule) -> list[Tensor]:
    stages, lends = stages_of(BOTH, schedule, rank.rank)
    return Pipeline(schedule, stages, rank.group, lends=lends).run(micro_batches(0)[0])


def test_outputs_of_an_evaluation_with_skips(ranks: RankPool) -> None:
    skips = skips_of(BOTH, LAYERS // 4)
    schedule = make_schedule("forward_only", num_ranks=2, num_micro_batches=MICRO_BATCHES, num_chunks=2, skips=skips)
    parts = layers_of(BOTH)
    tie(parts, BOTH, list(BOTH.tied))
    with torch.no_grad():
        want = [Part(parts)(tokens) for tokens in micro_batches(0)[0]]
    found = ranks.run(evaluate, schedule, size=2)[1]
    assert all(map(torch.equal, found, want))


class Plain(nn.Module):
    def forward(self, value: Tensor) -> Any:
        return value + 1


class Generous(nn.Module):
    def forward(self, value: Tensor) -> Any:
        return Handed(value, {"one": value, "two": value})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Plain(), "returns Handed with them; got <class 'torch.Tensor'>"),
        (Generous(), r"got Handed with \['one', 'two'\]"),
    ],
)
def test_a_stage_that_hands_out_something_else(module: nn.Module, message: str) -> None:
    schedule = Schedule.parse("schedule s placement 0,0 micro_batches 1 forward_only skips 0>1:one\n0: F0.0 F1.0")
    with pytest.raises((ValueError, RuntimeError), match=r"a stage with the skips \['one'\] to hand out .*" + message):
        Pipeline(schedule, {0: module, 1: Plain()}, None).run([torch.ones(1)])


def test_weights_that_are_not_lent_or_not_there() -> None:
    schedule = make_schedule("zb_v", num_ranks=1, num_micro_batches=1, skips=[Skip(0, 1, "tie", constant=True)])
    stages = {0: nn.Linear(2, 2), 1: nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"rank 0 has to lend \['tie'\]; got \[\]"):
        Pipeline(schedule, stages, None, loss=loss_of)
    with pytest.raises(ValueError, match=r"rank 0 has to lend \['tie'\]; got \['other'\]"):
        Pipeline(schedule, stages, None, loss=loss_of, lends={"other": stages[0].weight})
    with pytest.raises(AttributeError, match="`nothing`"):
        Borrower(nn.Linear(2, 2), {"nothing": "tie"})


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False)

    def forward(self, value: Tensor, skips: Mapping[str, Tensor]) -> Tensor:
        return self.inner(value) + skips["other"]


def test_a_borrower_hands_other_skips_on() -> None:
    module = Borrower(Adds(), {"inner.weight": "tie"})
    found = module(torch.ones(1, 2), skips={"tie": torch.eye(2), "other": torch.ones(1, 2)})
    assert found.tolist() == [[2.0, 2.0]]
    assert module.state_dict() == {}
