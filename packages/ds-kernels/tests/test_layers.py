"""The transformer layer against the same layer of torch.nn, with the same weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from ds_kernels.backends.plain.philox import element_numbers
from ds_kernels.layers import TransformerConfig, TransformerLayer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

HIDDEN, HEADS, TOKENS = 24, 3, 11
NAMES = {  # torch's names for norms before, without the norms
    "self_attn.in_proj_weight": "attn_qkvw",
    "self_attn.in_proj_bias": "attn_qkvb",
    "self_attn.out_proj.weight": "attn_ow",
    "self_attn.out_proj.bias": "attn_ob",
    "linear1.weight": "inter_w",
    "linear1.bias": "inter_b",
    "linear2.weight": "output_w",
    "linear2.bias": "output_b",
}


def names(pre_layer_norm: bool) -> dict[str, str]:
    first, second = ("norm", "attn_n") if pre_layer_norm else ("attn_n", "norm")
    first, second = (name if name.endswith("n") else f"{name}_" for name in (first, second))
    norms = {
        f"norm{i}.{kind}": f"{stem}{kind[0]}" for i, stem in ((1, first), (2, second)) for kind in ("weight", "bias")
    }
    return {**NAMES, **norms}


def made(**settings) -> TransformerLayer:
    config = TransformerConfig(
        **{"hidden_size": HIDDEN, "heads": HEADS, "initializer_range": 0.2, "layer_norm_eps": 1e-5, **settings}
    )
    layer = TransformerLayer(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1) * 0.5, std=0.2)
    return layer


def torchs(layer: TransformerLayer) -> nn.TransformerEncoderLayer:
    config = layer.config
    approximate = "tanh" if config.activation == "gelu_tanh" else "none"
    same = nn.TransformerEncoderLayer(
        HIDDEN,
        HEADS,
        config.inner_size,
        dropout=0.0,
        activation=lambda x: functional.gelu(x, approximate=approximate),
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=config.pre_layer_norm,
    )
    state, ours = same.state_dict(), names(config.pre_layer_norm)
    same.load_state_dict({name: layer.get_parameter(ours[name]).detach() for name in state})
    return same


def run(module, x, upstream, dtype, *masks, **keywords):
    """Output, and gradients of the input and of all parameters by name."""
    module = module.to(dtype)
    module.zero_grad()
    leaf = x.to(dtype, copy=True).requires_grad_()
    out = module(leaf, *masks, **keywords)
    out.backward(upstream.to(dtype))
    return {"out": out.detach(), "x": leaf.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def no_worse(got, plain, exact):
    for name, true in exact.items():
        wrong, theirs = (value[name].double().sub(true).norm().item() for value in (got, plain))
        floor = 4 * torch.finfo(got[name].dtype).eps * true.norm().item()
        assert wrong <= 2 * theirs + floor, name


def masks_of(kind: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """For this layer and, per head, for torch's."""
    if kind == "none":
        return None, None
    seen = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    seen[1, ..., 7:] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return (seen if kind == "bool" else added), added.expand(2, HEADS, TOKENS, TOKENS).reshape(-1, TOKENS, TOKENS)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_twice_the_error_of_torch(dtype, pre_layer_norm, activation, causal, mask):
    layer = made(pre_layer_norm=pre_layer_norm, activation=activation, causal=causal)
    same, ours = torchs(layer), names(pre_layer_norm)
    x, upstream = torch.randn(2, 2, TOKENS, HIDDEN).to(dtype)
    our_mask, their_mask = masks_of(mask)
    if causal:
        ahead = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        their_mask = ahead if their_mask is None else their_mask + ahead

    def theirs(dtype):
        found = run(same, x, upstream, dtype, None if their_mask is None else their_mask.to(dtype))
        return {ours.get(name, name): value for name, value in found.items()}

    plain, exact = theirs(dtype), theirs(torch.float64)
    if mask == "added":
        our_mask = our_mask.to(dtype)
    no_worse(run(layer, x, upstream, dtype, our_mask), plain, exact)


class SwiGlu(nn.Module):
    """The feed-forward part, written down."""

    def __init__(self, layer):
        super().__init__()
        self.inter_w, self.inter_b, self.output_w = (
            nn.Parameter(layer.get_parameter(name).detach().clone()) for name in ("inter_w", "inter_b", "output_w")
        )

    def forward(self, x):
        gate, value = functional.linear(x, self.inter_w, self.inter_b).chunk(2, -1)
        return functional.linear(functional.silu(gate) * value, self.output_w)


class Unfused:
    """A layer written down in torch operations, with the masks that the layer's seeds give."""

    def __init__(self, layer, dtype):
        self.layer, self.config, self.dtype = layer, layer.config, dtype
        self.weights = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}

    def __call__(self, x, seen=None):
        weights, pre = self.weights, self.config.pre_layer_norm
        attended = self.attention(self.norm(x, "norm_") if pre else x, seen)
        x = x + self.dropped(attended + weights["attn_ob"], self.config.hidden_dropout_ratio)
        x = x if pre else self.norm(x, "attn_n")
        inner = functional.linear(self.norm(x, "attn_n") if pre else x, weights["inter_w"], weights["inter_b"])
        if self.config.activation == "swiglu":
            gate, value = inner.chunk(2, -1)
            inner = functional.silu(gate) * value
        else:
            inner = functional.gelu(inner, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")
        fed = functional.linear(inner, weights["output_w"], weights["output_b"])
        x = x + self.dropped(fed, self.config.hidden_dropout_ratio)
        return x if pre else self.norm(x, "norm_")

    def attention(self, x, seen):
        batch, tokens, _ = x.shape
        together = functional.linear(x, self.weights["attn_qkvw"], self.weights["attn_qkvb"])
        query, key, value = together.view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        if self.config.causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
        weights = self.dropped(scores.softmax(-1), self.config.attn_dropout_ratio)
        return functional.linear((weights @ value).transpose(1, 2).reshape(x.shape), self.weights["attn_ow"])

    def norm(self, x, stem):
        weight, bias, eps = self.weights[f"{stem}w"], self.weights.get(f"{stem}b"), self.config.layer_norm_eps
        if self.config.norm == "rms_norm":
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def dropped(self, x, p):
        if p == 0 or not self.layer.training:
            return x
        numbers = element_numbers(torch.randint(2**63 - 1, ()), x.numel()).view(x.shape)
        return x * (numbers >= round(p * 2**16)) / (1 - p)

    def run(self, x, upstream, *args):
        leaf = x.to(self.dtype, copy=True).requires_grad_()
        out = self(leaf, *args)
        out.backward(upstream.to(self.dtype))
        return {"out": out.detach(), "x": leaf.grad, **{name: w.grad for name, w in self.weights.items()}}


SHAPES = {
    "bert": {"pre_layer_norm": False},
    "gpt": {"causal": True, "activation": "gelu_tanh"},
    "llama": {"causal": True, "activation": "swiglu", "norm": "rms_norm", "intermediate_size": 40},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [{}, {"hidden_dropout_ratio": 0.25, "attn_dropout_ratio": 0.125}], ids=bool)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_layer_written_down(dtype, shape, dropout, masked):
    layer = made(**SHAPES[shape], **dropout).to(dtype)
    x, upstream = torch.randn(2, 2, TOKENS, HIDDEN).to(dtype)
    args = (masks_of("bool")[0],) if masked else ()
    results = []
    for kind in (dtype, torch.float64):
        torch.manual_seed(6)
        results.append(Unfused(layer, kind).run(x, upstream, *args))
    torch.manual_seed(6)
    got = run(layer, x, upstream, dtype, *args)
    if dtype == torch.float64:
        torch.testing.assert_close(got, results[1], rtol=1e-9, atol=1e-9)
    else:
        no_worse(got, *results)


def test_swiglu_is_what_it_says():
    layer = made(activation="swiglu", intermediate_size=40)
    assert layer.inter_w.shape == (80, HIDDEN)
    x = torch.randn(2, TOKENS, HIDDEN)
    torch.testing.assert_close(layer._feed_forward(x), SwiGlu(layer)(x) + layer.output_b)


@pytest.mark.parametrize("settings", [{}, {"pre_layer_norm": False}, {"norm": "rms_norm"}], ids=str)
def test_names_of_the_state(settings):
    stems = ["attn_qkv", "attn_o", "attn_n", "inter_", "output_", "norm_"]
    names = [f"{stem}{kind}" for stem in stems for kind in "wb"]
    without = ["attn_nb", "norm_b"] if "norm" in settings else []
    assert list(made(**settings).state_dict()) == [name for name in names if name not in without]


@pytest.mark.parametrize("settings", [{}, {"pre_layer_norm": False, "gelu_checkpoint": True}], ids=str)
def test_a_checkpointed_layer_has_the_same_bits(settings):
    layer = made(hidden_dropout_ratio=0.2, attn_dropout_ratio=0.2, causal=True, **settings)
    x = torch.randn(2, TOKENS, HIDDEN, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(8)
        out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert all(map(torch.equal, *results))


def test_stochastic_mode_leaves_attention_with_dropout_to_torch(monkeypatch, caplog):
    calls = []
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(k["dropout_p"]) or attention(*a, **k)
    )
    x = torch.randn(2, TOKENS, HIDDEN)
    keyed, stochastic = (made(attn_dropout_ratio=0.5, stochastic_mode=mode) for mode in (False, True))
    stochastic.load_state_dict(keyed.state_dict())
    keyed(x)
    assert calls == []
    stochastic(x)
    assert calls == [0.5]
    torch.testing.assert_close(stochastic.eval()(x), keyed.eval()(x))
    assert calls == [0.5, 0.0, 0.0]
    assert not caplog.records
    made(stochastic_mode=True)
    assert [record.message for record in caplog.records] == [
        "stochastic_mode=True has no effect with attn_dropout_ratio=0"
    ]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_activation_computed_again_gives_the_same_bits_and_keeps_less(activation):
    kept, results = [], []
    x = torch.randn(2, TOKENS, HIDDEN)
    layer = made(activation=activation)
    for again in (False, True):
        other = made(activation=activation, gelu_checkpoint=again)
        other.load_state_dict(layer.state_dict())
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = other(x)
        kept.append(sizes.count(2 * TOKENS * 4 * HIDDEN))
        other.zero_grad()
        out.square().sum().backward()
        results.append([out, *(p.grad for p in other.parameters())])
    assert all(map(torch.equal, *results))
    assert kept[1] < kept[0]


def test_dropout_is_for_training_only_and_drawn_from_the_seed():
    layer = made(attn_dropout_ratio=0.3, hidden_dropout_ratio=0.3)
    x = torch.randn(2, TOKENS, HIDDEN)

    def out(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(out(1), out(1))
    assert not torch.equal(out(1), out(2))
    layer.eval()
    assert torch.equal(out(1), out(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True},
        {"pre_layer_norm": False, "hidden_dropout_ratio": 0.2, "attn_dropout_ratio": 0.2},
        {"gelu_checkpoint": True},
    ],
    ids=str,
)
def test_compiled_whole(settings):
    layer = made(**settings)
    x = torch.randn(2, TOKENS, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        torch.manual_seed(3)
        results.append(function(x))
    torch.testing.assert_close(*results)
    results[1].sum().backward()


def test_a_token_sees_nothing_ahead():
    layer, x = made(causal=True), torch.randn(1, TOKENS, HIDDEN)
    changed = x.clone()
    changed[0, 6:] += 1
    assert torch.equal(layer(x)[0, :6], layer(changed)[0, :6])


def test_initial_values():
    torch.manual_seed(0)
    for adjust, layers in itertools.product([True, False], [1, 8]):
        config = TransformerConfig(hidden_size=128, heads=4, adjust_init_range=adjust, num_hidden_layers=layers)
        layer = TransformerLayer(config)
        small = 0.02 / (2 * layers) ** 0.5 if adjust else 0.02
        assert layer.inter_w.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.output_w.std().item() == pytest.approx(small, rel=0.05)
        assert layer.norm_w.eq(1).all()
        assert layer.attn_qkvb.eq(0).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="heads must divide hidden_size=24; got 5"):
        TransformerConfig(hidden_size=24, heads=5)
    with pytest.raises(ValueError, match="activation must be 'gelu', 'gelu_tanh' or 'swiglu'; got 'relu'"):
        TransformerConfig(hidden_size=24, heads=3, activation="relu")
    with pytest.raises(ValueError, match=r"attn_dropout_ratio must be at least 0 and below 1; got 1\.0"):
        TransformerConfig(hidden_size=24, heads=3, attn_dropout_ratio=1.0)
    with pytest.raises(ValueError, match="norm must be 'layer_norm' or 'rms_norm'; got 'batch_norm'"):
        TransformerConfig(hidden_size=24, heads=3, norm="batch_norm")
    with pytest.raises(ValueError, match="hidden_size must be positive; got 0"):
        TransformerConfig(hidden_size=0, heads=3)


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((TOKENS, HIDDEN), None, r"hidden_states must be \[batch, tokens, \d+\], none of them 0; got \[\d+, \d+\]"),
        ((0, TOKENS, HIDDEN), None, r"none of them 0; got \[0, "),
        ((2, TOKENS, HIDDEN), torch.ones(2, TOKENS, dtype=torch.bool), r"goes in as mask\[:, None, None\]"),
        ((2, TOKENS, HIDDEN), torch.ones(2, 1, 1, TOKENS, dtype=torch.long), r"got torch.int64; .* pass mask.bool\(\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(shape, mask, message):
    with pytest.raises(ValueError, match=message):
        made()(torch.zeros(shape), mask)
