"""ds-core, ds-pipe and ds-zero together: a model in stages has the bits of the same model in one process."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_comm import LinkCost
from ds_comm.choosing import Level
from ds_pipe import Costs, LayerSpec, PipelineModule, TiedLayerSpec, make_greedy_schedule
from ds_pipe.planned import write_plan
from ds_pipe.stash import Pop, Stash
from ds_testkit import Rank, RankPool
from ds_testkit.processes import RankError
from ds_testkit.state import Exported, State, assembled, assert_same_bits, exported
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

pytestmark = pytest.mark.rung_c

WIDTH, VOCABULARY, STEPS = 16, 13, 4


class Pools:
    """Processes that are all of their world, which a pipeline needs."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._pools: dict[int, RankPool] = {}

    def run(self, function: Callable[..., Any], *args: Any, size: int) -> list[Any]:
        if size not in self._pools:
            self._pools[size] = RankPool(size, self._root)
        return self._pools[size].run(function, *args, size=size)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="module")
def ranks(pytestconfig: pytest.Config) -> Iterator[Pools]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pools = Pools(str(pytestconfig.rootpath))
    yield pools
    pools.close()
    torch.set_num_threads(threads)


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """64 sequences of 6 tokens, and what follows each token."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(VOCABULARY, (7,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


class Block(nn.Module):
    """A residual block; dropout is for tests of random numbers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(self.second(functional.gelu(self.first(self.norm(hidden)))))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def logits_of(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, embedding.weight)


def described(dropout: float = 0.0, *, tied: bool = False) -> PipelineModule:
    first: Any = LayerSpec(nn.Embedding, VOCABULARY, WIDTH)
    last: Any = LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    if tied:
        first = TiedLayerSpec("words", nn.Embedding, VOCABULARY, WIDTH)
        last = TiedLayerSpec("words", nn.Embedding, VOCABULARY, WIDTH, forward_fn=logits_of)
    blocks: list[Any] = [LayerSpec(Block, dropout) for _ in range(6)]
    if tied:
        blocks = [blocks[0], Stash("early"), *blocks[1:5], Pop("early", torch.add), blocks[5]]
    return PipelineModule([first, *blocks, last], loss_fn=loss_of)


SPLIT = {
    "partition_config": {
        "layer_specs": [
            {"patterns": [r"\d\.first$"], "partition_type": "column"},
            {"patterns": [r"\d\.second$"], "partition_type": "row"},
        ],
    }
}


class Setting(NamedTuple):
    """How to train."""

    stage: int = 0  # of ZeRO
    ranks: int = 1  # of one pipeline
    schedule: str = "1f1b"
    precision: str = "fp32"
    dropout: float = 0.0
    optimizer: str = "AdamW"
    micro_batches: int = 4  # of a step, over all pipelines
    tied: bool = False  # whether the head has the embedding's weight, and a value goes past blocks
    tensor: int = 0  # ranks over which blocks are split in two; 0: they are whole

    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": 2 * self.micro_batches,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.3,
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 3}},
            "zero_optimization": {"stage": self.stage, "unit_classes": ["Embedding", "Block", "Linear"]},
            **({} if self.precision == "fp32" else {self.precision: {"enabled": True}}),
            **({"tensor_parallel": {"blocks": 2, "autotp_size": self.tensor, **SPLIT}} if self.tensor else {}),
        }


class Outcome(NamedTuple):
    losses: list[float]
    norms: list[float | None]
    pieces: list[Exported]


def train_whole(rank: Rank, setting: Setting) -> Outcome:
    """The same layers as one module, without ds-pipe's engine."""
    layers = described(tied=setting.tied)
    model = layers.build(0, layers.num_layers)
    engine, _, loader, _ = ds_core.initialize(
        model, config=setting.config(), training_data=Sequences(), group=rank.group
    )
    losses: list[float] = []
    norms = []
    while len(norms) < STEPS:
        for tokens, targets in loader:
            losses.append(engine.backward(loss_of(engine(tokens), targets)).item())
            if engine.step().boundary:
                norms.append(engine.last_outcome.grad_norm)
                if len(norms) == STEPS:
                    break
    return Outcome(losses, norms, exported(engine._sharded))


def train(
    rank: Rank, setting: Setting, steps: int = STEPS, load: str | None = None, save: str | None = None
) -> Outcome:
    config = {**setting.config(), "pipeline": {"stages": setting.ranks, "schedule": setting.schedule}}
    engine, *_ = ds_core.initialize(
        described(setting.dropout, tied=setting.tied), config=config, training_data=Sequences(), group=rank.group
    )
    if load is not None:
        engine.load_checkpoint(load)
    losses, norms = [], []
    while engine.global_steps < steps:
        losses.append(engine.train_batch().item())
        norms.append(engine.get_global_grad_norm())
    if save is not None:
        engine.save_checkpoint(save)
    return Outcome(losses, norms, exported(engine._sharded))


def whole(outcomes: list[Outcome]) -> State:
    return assembled(outcome.pieces for outcome in outcomes)


def means(losses: list[float], count: int) -> list[float]:
    return [
        torch.tensor(losses[i : i + count], dtype=torch.float64).mean().item() for i in range(0, len(losses), count)
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zb_v"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bits_are_those_of_the_model_in_one_process(ranks: Pools, stage: int, schedule: str) -> None:
    want = ranks.run(train_whole, Setting(), size=1)
    for pipeline, data in ((1, 2), (2, 1), (2, 2), (4, 1)):
        setting = Setting(stage=stage, ranks=pipeline, schedule=schedule)
        got = ranks.run(train, setting, size=pipeline * data)
        assert_same_bits(whole(got), whole(want))
        for outcome in got:
            assert outcome.norms == want[0].norms
            assert outcome.losses == pytest.approx(means(want[0].losses, setting.micro_batches), rel=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1", "zb_v"])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_weight_of_two_stages_and_a_value_past_stages(
    ranks: Pools, stage: int, precision: str, schedule: str
) -> None:
    want = ranks.run(train_whole, Setting(tied=True, precision=precision), size=1)
    for pipeline, data in ((2, 1), (2, 2), (4, 1)):
        setting = Setting(stage=stage, ranks=pipeline, schedule=schedule, tied=True, precision=precision)
        got = ranks.run(train, setting, size=pipeline * data)
        assert_same_bits(whole(got), whole(want))
        assert all(outcome.norms == want[0].norms for outcome in got)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_random_numbers_do_not_depend_on_the_cut(ranks: Pools, precision: str) -> None:
    setting = Setting(dropout=0.2, precision=precision, optimizer="Lion")
    want = ranks.run(train, setting, size=1)
    for pipeline, data, schedule, stage in ((4, 1, "zb_h1", 1), (2, 2, "interleaved", 3), (2, 2, "zb_v", 2)):
        got = ranks.run(train, setting._replace(ranks=pipeline, schedule=schedule, stage=stage), size=pipeline * data)
        assert_same_bits(whole(got), whole(want))
        assert all((one.norms, one.losses) == (want[0].norms, want[0].losses) for one in got)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 1, "1f1b", 0), (1, 2, "gpipe", 3)),
        ((1, 1, "1f1b", 2), (2, 2, "zb_v", 3)),
        ((2, 2, "zb_h1", 3), (4, 1, "1f1b", 1)),
    ],
    ids=lambda cut: f"{cut[0]}x{cut[1]} {cut[2]} stage {cut[3]}",
)
def test_a_checkpoint_goes_on_at_another_cut(
    ranks: Pools, tmp_path: Path, before: tuple[int, int, str, int], after: tuple[int, int, str, int]
) -> None:
    want = ranks.run(train, Setting(dropout=0.2), size=1)
    folder = str(tmp_path)
    first, second = (Setting(dropout=0.2, ranks=cut[0], schedule=cut[2], stage=cut[3]) for cut in (before, after))
    ranks.run(train, first, 2, None, folder, size=before[0] * before[1])
    got = ranks.run(train, second, STEPS, folder, size=after[0] * after[1])
    assert_same_bits(whole(got), whole(want))
    assert got[0].losses == want[0].losses[2:]


class Looked(NamedTuple):
    evaluated: float
    files: list[str]
    weights: dict[str, Tensor]
    bias: Tensor | str
    group_rates: list[float]
    refused: list[str]


def look_around(rank: Rank, folder: str) -> Looked:
    setting = Setting(stage=3, ranks=2, schedule="interleaved")
    config = {**setting.config(), "pipeline": {"stages": "auto", "schedule": setting.schedule}}
    model = described()
    model.num_stages = 2
    engine, *_ = ds_core.initialize(
        model,
        config=config,
        training_data=Sequences(),
        model_parameters=lambda stage: [{"params": list(stage.parameters()), "lr": 0.01}],
        group=rank.group,
    )
    assert engine.is_first_stage() == (rank.rank < 2)
    assert engine.is_last_stage() == (rank.rank >= 2)
    assert engine.axes.mesh.mesh_dim_names == ("pipe", "data")
    engine.train_batch()
    evaluated = engine.eval_batch(iter(engine.training_dataloader)).item()
    assert engine.module.training
    weights = engine.module_state_dict()
    engine.save_16bit_model(folder)
    try:
        bias: Tensor | str = engine.access.full_param("7.bias")
    except ValueError as error:
        bias = str(error)
    engine.offload_states()
    engine.reload_states()
    with pytest.raises(RuntimeError, match="train_batch"):
        engine(torch.zeros(1))
    with pytest.raises(RuntimeError, match="train_batch"):
        engine.step()
    refused = []
    for source in (iter([]), engine.training_dataloader):
        try:
            engine.train_batch(source)
        except ValueError as error:
            refused.append(str(error))
    return Looked(
        evaluated, sorted(path.name for path in Path(folder).iterdir()), weights, bias, engine.get_lr(), refused
    )


def test_evaluation_weights_and_access(ranks: Pools, tmp_path: Path) -> None:
    found = ranks.run(look_around, str(tmp_path), size=4)
    assert len({one.evaluated for one in found}) == 1
    model = described().build(0, 8)
    weights = found[0].weights
    assert all(not one.weights for one in found[1:])
    model.load_state_dict(weights)
    # a new iterator over the data begins the second epoch
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1234 * 1_000_003 + 1)).tolist()
    samples = [Sequences()[index] for index in order[:8]]
    with torch.no_grad():
        losses = [
            loss_of(model(torch.stack([a[0], b[0]])), torch.stack([a[1], b[1]])).item()
            for a, b in zip(samples[::2], samples[1::2], strict=True)
        ]
    assert found[0].evaluated == pytest.approx(math.fsum(losses) / 4, rel=1e-6)
    assert found[0].files == [
        *(f"model-{index:05d}-of-00004.safetensors" for index in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert torch.equal(found[3].bias, weights["7.bias"])
    assert found[0].bias == "parameter '7.bias' is on rank 1 of the pipeline, this is rank 0: ask there"
    assert [one.group_rates for one in found] == [found[0].group_rates] * 4
    for one in found:
        assert "a step takes 2 micro-batches on each pipeline; the data ended after 0" in one.refused[0]
        assert "a TrainLoader begins anew whenever it is read" in one.refused[1]


def train_half(rank: Rank, pipeline: int, schedule: str) -> Outcome:
    """Train the second half of the layers only."""
    setting = Setting(stage=1, ranks=pipeline, schedule=schedule)
    config = {**setting.config(), "pipeline": {"stages": pipeline, "schedule": schedule}}

    def second_half(stage: nn.Module) -> list[dict[str, Any]]:
        for name, param in stage.named_parameters():
            param.requires_grad_(int(name.split(".")[0]) >= 5)
        return [{"params": [param for param in stage.parameters() if param.requires_grad]}]

    engine, *_ = ds_core.initialize(
        described(), config=config, training_data=Sequences(), model_parameters=second_half, group=rank.group
    )
    losses = [engine.train_batch().item() for _ in range(STEPS)]
    assert engine.get_lr() == [1e-2]
    return Outcome(losses, [engine.get_global_grad_norm()], exported(engine._sharded))


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_ranks_with_nothing_to_train(ranks: Pools, schedule: str) -> None:
    want = ranks.run(train_half, 1, "1f1b", size=1)
    for pipeline, data in ((2, 2), (4, 1)):
        got = ranks.run(train_half, pipeline, schedule, size=pipeline * data)
        assert_same_bits(whole(got), whole(want))
        assert all((one.norms, one.losses) == (want[0].norms, want[0].losses) for one in got)


def start_badly(rank: Rank, what: str) -> str:
    settings = Setting(ranks=2).config()
    given: dict[str, Any] = {"training_data": Sequences()}
    model = described()
    if what == "layer":
        model = PipelineModule([LayerSpec(nn.Linear, 2, 2), LayerSpec(nn.Linear, 2, -2)], loss_fn=loss_of)
    elif what == "parameters":
        given["model_parameters"] = [nn.Parameter(torch.zeros(1))]
    elif what == "optimizer":
        given["optimizer"] = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    elif what == "stages":
        settings["pipeline"] = {"stages": 3}
    try:
        engine, *_ = ds_core.initialize(model, config=settings, group=rank.group, **given)
        engine.train_batch(iter([(torch.zeros(2, 6, dtype=torch.long),) * 2] * 4) if rank.rank else None)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("layer", "RuntimeError: Trying to create tensor with negative dimension"),
        ("parameters", "leave model_parameters out to train all"),
        ("optimizer", "pass a function that makes the optimizer"),
        ("stages", "a pipeline of 3 ranks: 2 ranks are no whole number of pipelines"),
        ("sources", "some ranks pass data_iter and others leave it to training_data"),
    ],
)
def test_a_bad_start_ends_all_ranks(ranks: Pools, what: str, text: str) -> None:
    for said in ranks.run(start_badly, what, size=2):
        assert text in said


def run_out(rank: Rank, what: str) -> tuple[str, float, float]:
    config = Setting(ranks=2).config()
    config["train_batch_size"], config["pipeline"] = 2 * 4, {"timeout": 60.0}
    engine, *_ = ds_core.initialize(described(), config=config, group=rank.group)
    pairs = [tuple(torch.stack(both) for both in zip(Sequences()[i], Sequences()[i + 1])) for i in range(0, 8, 2)]
    broken = {"short": pairs[:3], "single": [*pairs[:3], pairs[3][0]], "raises": (pairs[i] for i in (0, 1, 2, 4))}
    call = engine.eval_batch if what == "short evaluation" else engine.train_batch
    given = broken[what.split()[0]] if rank.rank else pairs
    began = time.monotonic()
    try:
        call(iter(given))
    except (ValueError, IndexError, RuntimeError) as error:
        text, seconds = f"{type(error).__name__}: {error}", time.monotonic() - began
    return text, seconds, engine.train_batch(iter(pairs)).item()  # nothing was changed: all go on


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("short", "ValueError: a step takes 4 micro-batches on each pipeline; the data ended after 3"),
        ("short evaluation", "ValueError: a step takes 4 micro-batches on each pipeline; the data ended after 3"),
        ("single", "ValueError: micro-batches are pairs (inputs, targets); got Tensor"),
        ("raises", "IndexError: list index out of range"),
    ],
)
def test_data_that_fail_on_one_rank_stop_the_step_on_all(ranks: Pools, what: str, text: str) -> None:
    other, own = ranks.run(run_out, what, size=2)
    assert own[0] == text
    assert other[0] == f"RankError: rank 1: {text}"
    assert own[2] == other[2] > 0
    assert max(own[1], other[1]) < 30  # half of what a message may take


def train_as_planned(rank: Rank, path: str) -> Outcome:
    setting = Setting(stage=1, tied=True)
    config = {**setting.config(), "pipeline": {"plan": path}}
    engine, *_ = ds_core.initialize(described(tied=True), config=config, training_data=Sequences(), group=rank.group)
    losses = [engine.train_batch().item() for _ in range(STEPS)]
    return Outcome(losses, [engine.get_global_grad_norm()], exported(engine._sharded))


def test_a_plan_is_followed(ranks: Pools, tmp_path: Path) -> None:
    """An uneven cut with a schedule made for it, and a weight that two stages use, which the plan knows nothing of."""
    costs = Costs.uniform(4, forward=2.0, input_grad=3.0, weight_grad=1.0, latency=0.5)
    schedule = make_greedy_schedule(costs, num_ranks=2, num_micro_batches=4, placement=[0, 1, 1, 0])
    path = tmp_path / "it.plan.json"
    write_plan(path, schedule, [0, 1, 4, 7, 10])
    want = ranks.run(train_whole, Setting(tied=True), size=1)
    got = ranks.run(train_as_planned, str(path), size=2)
    assert_same_bits(whole(got), whole(want))
    assert got[0].norms == want[0].norms[-1:]
    write_plan(path, schedule, [0, 1, 4, 6, 9])
    with pytest.raises(RankError, match="the plan cuts 9 layers into 4 stages; the model has 10 layers"):
        ranks.run(train_as_planned, str(path), size=2)


def test_eight_ranks(ranks: Pools) -> None:
    want = ranks.run(train_whole, Setting(micro_batches=8), size=1)
    for pipeline, schedule, stage in ((4, "interleaved", 3), (2, "zb_v", 2)):
        setting = Setting(stage=stage, ranks=pipeline, schedule=schedule, micro_batches=8)
        got = ranks.run(train, setting, size=8)
        assert_same_bits(whole(got), whole(want))
        assert all(outcome.norms == want[0].norms for outcome in got)
    split = Setting(stage=3, ranks=2, schedule="zb_h1", tensor=2)
    want = ranks.run(train, split._replace(ranks=1, tensor=1), size=1)
    got = ranks.run(train, split, size=8)
    assert_same_bits(whole(got), whole(want))
    assert all((outcome.norms, outcome.losses) == (want[0].norms, want[0].losses) for outcome in got)


def train_coded(rank: Rank, coded: bool) -> list[float]:
    setting = Setting(stage=1, ranks=2)
    config = {**setting.config(), "pipeline": {"stages": 2}}
    if coded:
        config["zero_optimization"] = {"stage": 1, "zero_quantized_gradients": True}
    engine, *_ = ds_core.initialize(described(), config=config, training_data=Sequences(), group=rank.group)
    return [engine.train_batch().item() for _ in range(20)]


def test_compressed_gradients_on_the_data_axis(ranks: Pools) -> None:
    exact = ranks.run(train_coded, False, size=4)[0]
    coded = ranks.run(train_coded, True, size=4)
    assert coded[0] != exact
    assert all(losses == coded[0] for losses in coded)
    assert abs(coded[0][-1] - exact[-1]) < 0.1 < exact[0] - exact[-1]


def train_replanned(rank: Rank, setting: Setting) -> tuple[Outcome, list[str]]:
    config = {**setting.config(), "pipeline": {"stages": setting.ranks, "schedule": setting.schedule, "replan": 3}}
    engine, *_ = ds_core.initialize(
        described(setting.dropout, tied=True), config=config, training_data=Sequences(), group=rank.group
    )
    said = Said()
    logger = logging.getLogger("ds_pipe")
    logger.addHandler(said)
    level = logger.level
    logger.setLevel(logging.INFO)
    losses = [engine.train_batch().item() for _ in range(STEPS + 1)]
    logger.setLevel(level)
    logger.removeHandler(said)
    return Outcome(losses, [engine.get_global_grad_norm()], exported(engine._sharded)), said.texts


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.mark.parametrize(("schedule", "stage"), [("gpipe", 0), ("zb_v", 3)])
def test_bits_stay_when_the_schedule_changes(ranks: Pools, schedule: str, stage: int) -> None:
    setting = Setting(schedule=schedule, dropout=0.2, tied=True, stage=stage)
    want = ranks.run(train, setting._replace(schedule="1f1b", stage=0), STEPS + 1, size=1)
    for pipeline, data in ((2, 1), (2, 2)):
        found = ranks.run(train_replanned, setting._replace(ranks=pipeline), size=pipeline * data)
        got = [outcome for outcome, _ in found]
        assert_same_bits(whole(got), whole(want))
        assert all(outcome.losses == want[0].losses for outcome in got)
        (said,) = found[0][1]
        assert said.startswith(f"pipeline: by the costs of the first steps {schedule} takes ")
        assert all(texts == [said] for _, texts in found)  # of all pipelines, which add up their gradients


def train_compiled(
    rank: Rank, schedule: str, backend: str | None, recompute: bool = False
) -> tuple[Outcome, list[str]]:
    setting = Setting(ranks=4, schedule=schedule)
    config = {**setting.config(), "pipeline": {"stages": 4, "schedule": schedule}}
    config["activation_checkpointing"] = {"blocks": recompute}
    config["zero_optimization"] = {"stage": 1, "unit_classes": ["Block"]}
    layers = [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), LayerSpec(Block, 0.0), LayerSpec(Block, 0.0)]
    layers.append(LayerSpec(nn.Linear, WIDTH, VOCABULARY))
    model = PipelineModule(layers, loss_fn=loss_of, partition_method="uniform")
    engine, *_ = ds_core.initialize(model, config=config, training_data=Sequences(), group=rank.group)
    refused = []
    if backend is not None:
        engine.compile(backend=backend)
        assert engine.is_compiled
        try:
            engine.compile(backend=backend)
        except RuntimeError as error:
            refused.append(str(error))
    losses = [engine.train_batch().item() for _ in range(2)]
    return Outcome(losses, [engine.get_global_grad_norm()], exported(engine._sharded)), refused


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_stages_without_blocks_stay_as_they_are_when_others_are_compiled(ranks: Pools, schedule: str) -> None:
    """The first stage is an embedding, the last one a linear layer."""
    want = [outcome for outcome, _ in ranks.run(train_compiled, schedule, None, size=4)]
    found = ranks.run(train_compiled, schedule, "eager", size=4)
    got = [outcome for outcome, _ in found]
    assert_same_bits(whole(got), whole(want))
    assert [outcome.losses for outcome in got] == [outcome.losses for outcome in want]
    assert all(refused == ["the model is compiled already: compile it once, with all settings"] for _, refused in found)
    again = [outcome for outcome, _ in ranks.run(train_compiled, schedule, "eager", True, size=4)]
    assert_same_bits(whole(again), whole(want))


def compile_nothing(rank: Rank) -> str:
    model = PipelineModule([LayerSpec(nn.Linear, 2, 2) for _ in range(2)], loss_fn=nn.functional.mse_loss)
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = ds_core.initialize(model, config=config, group=rank.group)
    with pytest.raises(ValueError, match="no stage has anything to compile") as found:
        engine.compile()
    assert not engine.is_compiled
    with pytest.raises(ValueError, match="no stage has anything to recompute: none has a block"):
        ds_core.initialize(model, config={**config, "activation_checkpointing": {"blocks": True}}, group=rank.group)
    return str(found.value)


def test_without_any_block_it_is_said_what_to_do(ranks: Pools) -> None:
    first, second = ranks.run(compile_nothing, size=2)
    assert first == second
    assert "name the classes of the model's blocks in unit_classes" in first


def train_by_links(rank: Rank) -> tuple[list[float], list[str]]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_comm")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    setting = Setting(stage=1, ranks=2, schedule="interleaved")
    auto = {"step_seconds": 1e-6, "compute_seconds": 1e-7, "max_error": 1.0}
    config = {
        **setting.config(),
        "pipeline": {"stages": setting.ranks, "schedule": setting.schedule},
        "compression": {"auto": auto},
    }
    original = Level.probe
    Level.probe = lambda *_: LinkCost(latency=0.0, bandwidth=100.0)  # type: ignore[method-assign]
    try:
        engine, *_ = ds_core.initialize(described(), config=config, training_data=Sequences(), group=rank.group)
    finally:
        Level.probe = original  # type: ignore[method-assign]
    losses = [engine.train_batch().item() for _ in range(20)]
    logger.removeHandler(handler)
    logger.setLevel(level)
    return losses, told


def test_codes_are_chosen_for_all_stages_of_a_rank(ranks: Pools) -> None:
    exact = ranks.run(train_coded, False, size=4)[0]
    found = ranks.run(train_by_links, size=4)
    chosen = [text for _, told in found for text in told if "buffers of gradients" in text]
    assert len(chosen) == 2, "the first data rank of each pipeline rank tells"
    assert all("exact" not in text.split(";")[0] for text in chosen), "of every stage"
    for losses, _ in found:
        assert losses == found[0][0]
        assert abs(losses[-1] - exact[-1]) < 0.2 < exact[0] - exact[-1]
