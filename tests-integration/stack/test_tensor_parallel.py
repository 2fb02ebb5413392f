"""Tensor parallelism beside pipelines, ZeRO and data: the same bits on any number of tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ds_core
import ds_zero
import pytest
import torch
from ds_pipe import LayerSpec, PipelineModule, TiedLayerSpec
from ds_testkit import Rank, RankPool
from ds_testkit.state import Exported, State, assembled, assert_same_bits, exported
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

pytestmark = pytest.mark.rung_c

WIDTH, HEADS, VOCABULARY, TOKENS, STEPS, BLOCKS = 16, 4, 16, 8, 3, 4


class Pools:
    """Processes that are all of their world."""

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
    """64 sequences of tokens, and what follows each token."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


class Attention(nn.Module):
    """With the names and the reshaping of Hugging Face's Llama; two heads share keys and values."""

    def __init__(self, key_heads: int = HEADS) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.groups = HEADS // key_heads
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(WIDTH, key_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden).view(shape).transpose(1, 2)
        key = self.k_proj(hidden).view(shape).transpose(1, 2).repeat_interleave(self.groups, 1)
        value = self.v_proj(hidden).view(shape).transpose(1, 2).repeat_interleave(self.groups, 1)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).reshape(*hidden.shape[:-1], -1).contiguous())


class Gated(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.dropout(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)))


class Layer(nn.Module):
    """A decoder layer; dropout is for tests of random numbers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(WIDTH), Attention()
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(WIDTH), Gated(dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden)))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def logits_of(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, embedding.weight)


def described(dropout: float = 0.0, *, tied: bool = False) -> PipelineModule:
    first: Any = LayerSpec(nn.Embedding, VOCABULARY, WIDTH)
    last: Any = LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)
    if tied:
        first = TiedLayerSpec("words", nn.Embedding, VOCABULARY, WIDTH)
        last = TiedLayerSpec("words", nn.Embedding, VOCABULARY, WIDTH, forward_fn=logits_of)
    layers = [LayerSpec(Layer, dropout) for _ in range(3)]
    return PipelineModule([first, *layers, LayerSpec(nn.RMSNorm, WIDTH), last], loss_fn=loss_of)


VOCABULARY_SPECS = [
    {"patterns": ["0$"], "partition_type": "vocab"},
    {"patterns": ["5$"], "partition_type": "column", "gather_output": True},
    {"patterns": [r".*mlp\.dropout$"], "partition_type": "dropout"},
]


class Setting(NamedTuple):
    """How to train."""

    tensor: int = 1
    data: int = 1
    pipe: int = 1
    stage: int = 0  # of ZeRO
    precision: str = "fp32"
    dropout: float = 0.0
    optimizer: str = "AdamW"
    schedule: str = "1f1b"
    vocabulary: bool = True  # whether embedding and head are split, too
    blocks: int = BLOCKS
    tied: bool = False

    @property
    def size(self) -> int:
        return self.tensor * self.data * self.pipe

    def config(self) -> dict[str, Any]:
        specs = VOCABULARY_SPECS if self.vocabulary else []
        return {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.3,
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "zero_optimization": {"stage": self.stage, "unit_classes": ["Layer"]},
            "tensor_parallel": {
                "autotp_size": self.tensor,
                "blocks": self.blocks,
                "preset_model": "llama",
                "partition_config": {"layer_specs": specs},
            },
            **({} if self.precision == "fp32" else {self.precision: {"enabled": True}}),
        }


class Outcome(NamedTuple):
    losses: list[float]
    norms: list[float | None]
    pieces: list[Exported]
    steps_skipped: int


def train(
    rank: Rank, setting: Setting, steps: int = STEPS, load: str | None = None, save: str | None = None
) -> Outcome:
    """Train a model in one part."""
    layers = described(setting.dropout, tied=setting.tied)
    model = layers.build(0, layers.num_layers)
    if rank.rank:
        nn.init.zeros_(model.get_parameter("1.mlp.down_proj.weight"))  # the first rank's values count
    engine, _, loader, _ = ds_core.initialize(
        model, config=setting.config(), training_data=Sequences(), group=rank.group
    )
    if load is not None:
        engine.load_checkpoint(load)
    losses: list[float] = []
    norms = []
    while engine.global_steps < steps:
        for tokens, targets in loader:
            losses.append(engine.backward(loss_of(engine(tokens), targets)).item())
            if engine.step().boundary:
                norms.append(engine.last_outcome.grad_norm)
                if engine.global_steps == steps:
                    break
    if save is not None:
        engine.save_checkpoint(save)
    return Outcome(losses, norms, exported(engine._sharded), engine.skipped_steps)


def train_stages(
    rank: Rank, setting: Setting, steps: int = STEPS, load: str | None = None, save: str | None = None
) -> Outcome:
    """Train a model in stages."""
    config = {**setting.config(), "pipeline": {"stages": setting.pipe, "schedule": setting.schedule}}
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
    return Outcome(losses, norms, exported(engine._sharded), engine.skipped_steps)


def whole(outcomes: list[Outcome]) -> State:
    return assembled(outcome.pieces for outcome in outcomes)


def by_micro_batch(outcomes: list[Outcome], setting: Setting) -> list[float]:
    """Put the losses of data ranks in the order of the global micro-batches."""
    rows = [outcomes[data * setting.tensor].losses for data in range(setting.data)]
    return [loss for column in zip(*rows, strict=True) for loss in column]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bits_do_not_depend_on_the_number_of_tensor_ranks(ranks: Pools, precision: str) -> None:
    want = ranks.run(train, Setting(precision=precision), size=1)
    cases = [(2, 2, 0), (4, 1, 1), (2, 2, 3), (4, 1, 3), (2, 2, 2)]
    for tensor, data, stage in {"fp32": cases, "bf16": cases[2:4], "fp16": cases[2:3]}[precision]:
        setting = Setting(tensor, data, stage=stage, precision=precision)
        got = ranks.run(train, setting, size=setting.size)
        assert_same_bits(whole(got), whole(want))
        for outcome in got:
            assert outcome.norms == want[0].norms
            assert outcome.steps_skipped == want[0].steps_skipped
        assert by_micro_batch(got, setting) == want[0].losses


@pytest.mark.parametrize("optimizer", ["Lamb", "Muon"])
def test_random_numbers_do_not_depend_on_the_number_of_tensor_ranks(ranks: Pools, optimizer: str) -> None:
    setting = Setting(dropout=0.3, optimizer=optimizer)
    want = ranks.run(train, setting, size=1)
    for tensor, data, stage in ((4, 1, 3), (2, 2, 1)):
        here = setting._replace(tensor=tensor, data=data, stage=stage)
        got = ranks.run(train, here, size=here.size)
        assert_same_bits(whole(got), whole(want))
        assert by_micro_batch(got, here) == want[0].losses


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bits_beside_a_pipeline(ranks: Pools, dropout: float) -> None:
    want = ranks.run(train_stages, Setting(dropout=dropout), size=1)
    if not dropout:  # random numbers of a pipeline are keyed by layer
        assert_same_bits(whole(want), whole(ranks.run(train, Setting(), size=1)))
    for setting in (
        Setting(2, 1, 2, stage=0),
        Setting(2, 1, 2, stage=3, schedule="zb_h1"),
        Setting(2, 2, 1, stage=2),
        Setting(1, 2, 2, stage=1, schedule="interleaved"),
        Setting(4, 1, 1, stage=1),
    ):
        got = ranks.run(train_stages, setting._replace(dropout=dropout), size=setting.size)
        assert_same_bits(whole(got), whole(want))
        assert all((one.norms, one.losses) == (want[0].norms, want[0].losses) for one in got)


def test_a_checkpoint_goes_on_with_other_numbers_of_tensor_ranks(ranks: Pools, tmp_path: Path) -> None:
    want = ranks.run(train, Setting(dropout=0.2), STEPS, size=1)
    folders = [str(tmp_path / name) for name in "ab"]
    first = Setting(2, 2, stage=3, dropout=0.2)
    ranks.run(train, first, 1, None, folders[0], size=4)
    ranks.run(train, Setting(1, 1, dropout=0.2), 2, folders[0], folders[1], size=1)
    got = ranks.run(train, Setting(4, 1, stage=1, dropout=0.2), STEPS, folders[1], size=4)
    assert_same_bits(whole(got), whole(want))
    stages = ranks.run(train_stages, Setting(2, 1, 2, stage=1), 1, folders[0], size=4)
    assert whole(stages).keys() == whole(want).keys()
    for blocks, said in ((2, "split into 2 blocks"), (None, "not split")):
        (refused,) = ranks.run(load, blocks, folders[0], size=1)
        assert f"is of a model split into 4 blocks, this run's model is {said}" in refused


def load(rank: Rank, blocks: int | None, folder: str) -> str:
    settings = Setting(blocks=blocks or 1).config()
    layers = described()
    engine, *_ = ds_core.initialize(layers.build(0, layers.num_layers), config=settings, group=rank.group)
    try:
        engine.load_checkpoint(folder)
    except ValueError as error:
        return str(error)
    return "nothing"


class Looked(NamedTuple):
    weights: dict[str, Tensor]
    files: list[str]
    refused: str


def look_around(rank: Rank, setting: Setting, folder: str) -> Looked:
    layers = described()
    if setting.pipe == 1:
        engine, _, loader, _ = ds_core.initialize(
            layers.build(0, layers.num_layers),
            config=setting.config(),
            training_data=Sequences(),
            group=rank.group,
        )
        tokens, targets = next(iter(loader))
        engine.backward(loss_of(engine(tokens), targets))
        engine.zero_grad()
    else:
        config = {**setting.config(), "pipeline": {"stages": setting.pipe}}
        engine, *_ = ds_core.initialize(layers, config=config, training_data=Sequences(), group=rank.group)
    engine.save_16bit_model(folder)
    weights = engine.module_state_dict()
    try:
        engine.save_16bit_model(folder)
    except RuntimeError as error:
        return Looked(weights, sorted(path.name for path in Path(folder).iterdir()), str(error))
    return Looked(weights, [], "nothing")


@pytest.mark.parametrize("setting", [Setting(2, 2, stage=3), Setting(4, stage=1), Setting(2, 1, 2, stage=3)])
def test_weights_have_the_names_and_shapes_they_had(ranks: Pools, tmp_path: Path, setting: Setting) -> None:
    setting = setting._replace(precision="bf16")
    found = ranks.run(look_around, setting, str(tmp_path / "weights"), size=4)
    layers = described()
    model = layers.build(0, layers.num_layers).bfloat16()
    assert all(not one.weights for one in found[1:])
    assert found[0].weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(found[0].weights[name], weight), name
    number = setting.pipe
    names = ["model.safetensors"]
    if number > 1:
        names = [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]
        names.append("model.safetensors.index.json")
    assert found[0].files == names
    assert "exists already" in found[0].refused
    target = ds_zero.shard(layers.build(0, layers.num_layers), None)
    nn.init.zeros_(target.module.get_parameter("1.mlp.down_proj.weight"))
    assert ds_zero.load_safetensors(target, tmp_path / "weights") == []
    for name, weight in target.weights.state_dict().items():
        assert torch.equal(weight, found[0].weights[name].float()), name


class Llama(nn.Module):
    """As Hugging Face's: two key heads for four of queries, embedding and head tied."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.model.layers = nn.ModuleList(Layer() for _ in range(2))
        for layer in self.model.layers:
            layer.self_attn = Attention(key_heads=2)
        self.model.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            hidden = layer(hidden)
        return self.lm_head(self.model.norm(hidden))


def train_llama(rank: Rank, tensor: int, stage: int, split: bool) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(11)
    model = Llama()
    parallel = {"tp": {"tp_size": tensor}, "blocks": 2, "preset_model": "llama", "vocab_parallel_lm_head": True}
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        **({"tensor_parallel": parallel} if split else {}),
    }
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 1e-2}])
    engine, _, loader, _ = ds_core.initialize(
        model, optimizer, config=config, training_data=Sequences(), group=rank.group
    )
    losses = []
    while engine.global_steps < STEPS:
        for tokens, targets in loader:
            losses.append(engine.backward(loss_of(engine(tokens), targets)).item())
            if engine.step().boundary and engine.global_steps == STEPS:
                break
    return losses, engine.module_state_dict()


def test_a_llama_by_the_preset(ranks: Pools) -> None:
    (want,) = ranks.run(train_llama, 1, 0, True, size=1)
    for stage in (1, 3):
        found = ranks.run(train_llama, 2, stage, True, size=4)
        assert [loss for pair in zip(found[0][0], found[2][0], strict=True) for loss in pair] == want[0]
        assert found[0][1].keys() == want[1].keys()
        for name, weight in found[0][1].items():
            assert torch.equal(weight, want[1][name]), name
    (whole_losses, whole_weights) = ranks.run(train_llama, 1, 0, False, size=1)[0]
    assert want[0] == pytest.approx(whole_losses, rel=1e-4)
    assert want[1].keys() == whole_weights.keys()
    for name, weight in whole_weights.items():
        assert torch.allclose(want[1][name], weight, rtol=1e-3, atol=1e-4), name


class Normed(nn.Module):
    """A norm within a split region: each rank has the gradient of its own heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value) * self.scale)


SPECS = [{"patterns": ["first"]}, {"patterns": ["second"], "partition_type": "row"}]


def bad_settings(what: str) -> dict[str, Any]:
    settings = Setting(2).config()
    parallel = settings["tensor_parallel"]
    if what in ("pattern", "pattern of no stage"):
        parallel["partition_config"] = {"layer_specs": [{"patterns": ["feet"]}]}
    elif what == "key":
        parallel["partition_config"] = {"layer_specs": [{"pattern": ["feet"]}]}
    elif what == "tied":
        parallel |= {"autotp_size": 1, "partition_config": {"layer_specs": VOCABULARY_SPECS[:1]}}
    elif what == "norm":
        settings["zero_optimization"] = {"stage": 1}
        settings["tensor_parallel"] = {"autotp_size": 2, "partition_config": {"layer_specs": SPECS}}
    else:
        numbers = {"blocks": 1, "heads": 8}
        parallel |= {"blocks": numbers[what]} if what in numbers else {}
        parallel |= {"autotp_size": 8, "blocks": 8} if what == "ranks" else {}
        parallel |= {"tp": {"tp_size": 4}} if what == "two sizes" else {}
    if what in ("pattern of no stage", "tied"):
        settings["pipeline"] = {"stages": 2 if what == "tied" else 1}
    return settings


def start_badly(rank: Rank, what: str) -> str:
    settings = bad_settings(what)
    model: Any = Normed() if what == "norm" else described(tied=what == "tied")
    if "pipeline" not in settings and what != "norm":
        model = model.build(0, 6)
    try:
        engine, *_ = ds_core.initialize(model, config=settings, group=rank.group)
        for _ in range(4):
            engine.backward(engine(torch.randn(2, 4, generator=torch.Generator().manual_seed(1))).square().mean())
            engine.step()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("blocks", "2 ranks (autotp_size) do not divide blocks = 1"),
        ("heads", "self_attn.q_proj: 4 heads of 4 each cannot be cut into 8 equal blocks"),
        ("pattern", "tensor_parallel: no module of the model matches 'feet'; it has 0"),
        ("pattern of no stage", "tensor_parallel: no module of the model matches 'feet'; it has 0"),
        ("ranks", "4 ranks are no multiple of that; start a multiple of 8"),
        ("key", "unknown key tensor_parallel.partition_config.layer_specs[0].pattern"),
        ("two sizes", "autotp_size = 2 and tensor_parallel.tp.tp_size = 4 each say"),
        ("tied", "0.weight is to be split, and another stage of the pipeline uses it, too"),
        ("norm", "such a parameter stands between split layers"),
    ],
)
def test_a_bad_start_ends_all_ranks(ranks: Pools, what: str, text: str) -> None:
    found = ranks.run(start_badly, what, size=4)
    assert any(text in said for said in found)
    assert "nothing" not in found


def train_recomputed(rank: Rank, setting: Setting) -> Outcome:
    """Keep half of each layer's input on each of two tensor ranks, and run layers again in the backward pass."""
    layers = described(setting.dropout)
    config = {
        **setting.config(),
        "activation_checkpointing": {"blocks": setting.tensor > 1, "partition_activations": setting.tensor > 1},
    }
    engine, _, loader, _ = ds_core.initialize(
        layers.build(0, layers.num_layers), config=config, training_data=Sequences(), group=rank.group
    )
    losses = []
    for tokens, targets in loader:
        losses.append(engine.backward(loss_of(engine(tokens), targets)).item())
        if engine.step().boundary and engine.global_steps == 2:
            break
    return Outcome(losses, [engine.get_global_grad_norm()], exported(engine._sharded), engine.skipped_steps)


def test_recomputed_layers_whose_inputs_are_partitioned(ranks: Pools) -> None:
    want = ranks.run(train_recomputed, Setting(dropout=0.2), size=1)
    got = ranks.run(train_recomputed, Setting(2, 2, stage=3, dropout=0.2), size=4)
    assert_same_bits(whole(got), whole(want))
    assert all(outcome.norms == want[0].norms for outcome in got)
