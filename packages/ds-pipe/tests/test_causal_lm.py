"""Causal language models in Hugging Face's manner, cut at their decoder layers: bits and names are the model's."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytest
import torch
from ds_pipe import Pipeline, PipelineModule, make_schedule
from ds_pipe.packets import signature_of
from ds_pipe.skips import Skip
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, WORDS, LAYERS = 8, 2, 13, 3


class Output(tuple):
    """Logits, as the first of several."""

    @property
    def logits(self) -> Tensor:
        return self[0]


class Decoder(nn.Module):
    """A decoder layer whose mask depends on its kind, and that gets positions by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention_type = kind
        self.input_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past: object | None = None,
    ) -> tuple[Tensor, None]:
        cos, sin = position_embeddings
        q, k, v = self.qkv(self.input_norm(hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (x * cos + x.flip(-1) * sin for x in (q, k))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.silu(self.up(self.mlp_norm(hidden)))), None


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1, 0.1, 1.0]), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * self.frequencies
        return angles.cos(), angles.sin()


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Decoder("local" if index % 2 else "full") for index in range(LAYERS))
        self.norm, self.rotary_emb = nn.RMSNorm(WIDTH), Rotary()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Tensor:
        hidden = self.embed_tokens(input_ids) * WIDTH**0.5
        length = input_ids.shape[1]
        positions = self.rotary_emb(torch.arange(length))
        full = torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            full = full & attention_mask[:, None, None, :]
        masks = {"full": full, "local": full & torch.ones(length, length, dtype=torch.bool).triu(-2)}
        for layer in self.layers[:LAYERS]:
            hidden = layer(
                hidden,
                attention_mask=masks[layer.attention_type],
                position_embeddings=positions,
                past=object() if use_cache else None,
            )[0]
        return self.norm(hidden)


class Model(nn.Module):
    """As a Hugging Face model: ``use_cache`` is on, and what travels then is no tensor."""

    def __init__(self, *, scale: float = 1.0, tied: bool = True) -> None:
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(WIDTH, WORDS, bias=False)
        self._scale = scale
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> Output:
        return Output((self._scale * self.lm_head(self.model(input_ids, attention_mask, use_cache)), None))


class Run(NamedTuple):
    logits: list[Tensor]
    grads: dict[str, Tensor]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, -2), target.flatten())


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (2, 7), generator=generator) for _ in range(2)]


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def check(model: nn.Module, cut: int, inputs: list[Any], **settings: Any) -> None:
    """Compare a model that is run whole with its two parts in a pipeline; the model keeps its own gradients."""
    described = PipelineModule.from_causal_lm(model, loss_fn=loss_of, **settings)
    for given, target in zip(inputs, tokens(), strict=True):
        named = given if isinstance(given, dict) else {"input_ids": given}
        out = model(**named, use_cache=False)
        (loss_of(out[0], target) * 0.5).backward()
    want = {name: grad.clone() for name, grad in grads_of(model).items()}
    model.zero_grad()
    loans = described.loans([0, cut, described.num_layers])
    parts = [
        described.build(0, cut),
        described.build(cut, described.num_layers, borrows={loan.key: loan.skip for loan in loans}),
    ]
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    skips = [Skip(loan.source, loan.target, loan.skip, constant=True) for loan in loans]
    schedule = make_schedule("interleaved", num_ranks=1, num_micro_batches=2, num_chunks=2, skips=skips)
    lends = {loan.skip: model.get_parameter(loan.weight) for loan in loans}
    Pipeline(schedule, dict(enumerate(parts)), None, loss=loss_of, lends=lends).run(inputs, tokens())
    for name, grad in grads_of(model).items():
        assert torch.equal(grad, want[name]), name
    signature_of(parts[0](inputs[0]))  # what is between the parts can travel
    model.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 4, 5])
def test_bits_and_names_are_those_of_the_model(cut: int, tied: bool) -> None:
    torch.manual_seed(0)
    model = Model(tied=tied)
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    check(model, cut, tokens())
    check(model, cut, tokens(), layers="model.layers", after=("model.norm", "lm_head"))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :2] = False
    check(model, cut, [{"input_ids": each, "attention_mask": mask} for each in tokens()])
    assert {name: vars(module) for name, module in model.named_modules()}.keys() == before.keys()
    assert all(vars(module).keys() == before[name].keys() for name, module in model.named_modules())


def test_a_model_on_meta_costs_nothing_and_is_loaded_in_parts() -> None:
    torch.manual_seed(0)
    model = Model()
    with torch.device("meta"):
        described = PipelineModule.from_causal_lm(Model())
    assert described.num_layers == LAYERS + 3
    assert [*described.ties] == ["model.embed_tokens.weight"]
    part = described.build(1, 3).to_empty(device="cpu")
    wanted = {name: value for name, value in model.state_dict().items() if name in part.state_dict()}
    part.load_state_dict(wanted)
    assert len(wanted) == 2 * 8
    first = PipelineModule.from_causal_lm(model).build(0, 1)
    hidden, *rest = first(tokens()[0])
    assert len(rest[0]) == 5  # two masks, cosines and sines, and None
    assert rest[2] == [0, 1, 0]
    assert part((hidden, *rest))[0].shape == (2, 7, WIDTH)


def test_models_that_are_built_in_another_way() -> None:
    with pytest.raises(ValueError, match=r"no decoder layers where they were looked for: model.layers, followed by"):
        PipelineModule.from_causal_lm(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"looked for: a.b, followed by c. The model has .*'model', 'model.embed"):
        PipelineModule.from_causal_lm(Model(), layers="a.b", after=("c",))
    with pytest.raises(
        ValueError, match=r"say both where decoder layers are and what follows; got layers='model.layers'"
    ):
        PipelineModule.from_causal_lm(Model(), layers="model.layers")
    with pytest.raises(ValueError, match="run layer by layer, the model gives other logits"):
        PipelineModule.from_causal_lm(Model(scale=0.5))
    after = ("model.norm", "lm_head", lambda logits: 0.5 * logits)
    assert PipelineModule.from_causal_lm(Model(scale=0.5), layers="model.layers", after=after).num_layers == LAYERS + 4
    model = Model()
    model.model.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"model itself has \['extra'\], and parts of it lie in several layers"):
        PipelineModule.from_causal_lm(model)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the look-alike above is the test")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2", "Qwen3", "Mistral", "Gemma", "GPTNeoX", "Phi", "OPT"])
def test_models_of_transformers(family: str) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    if family == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if family == "OPT":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
    config = getattr(transformers, f"{family}Config")(vocab_size=WORDS, pad_token_id=0, **sizes)
    if family not in ("GPT2", "OPT", "GPTNeoX", "Phi"):
        config.num_key_value_heads = 1
        config.head_dim = 8
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    check(model, 2, tokens())
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    check(model, 3, [{"input_ids": each, "attention_mask": mask} for each in tokens()])
