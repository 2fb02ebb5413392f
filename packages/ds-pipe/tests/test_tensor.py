"""Layers split into blocks: the unsplit model's values, and the same bits on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ds_pipe.tensor import BlockDropout, Blocks, Plan, Ranks, Rule, grad_norm, preset, split
from ds_pipe.tensor.blocks import Cut
from ds_pipe.tensor.functions import copies, gathered, pieces, together, total
from ds_pipe.tensor.sums import tree_sum
from ds_testkit.threads import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, VOCABULARY, TOKENS = 32, 8, 24, 16


class Attention(nn.Module):
    """Causal, with one matrix for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head_dim = WIDTH // HEADS

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        query, key, value = (
            each.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for each in self.qkv(hidden).chunk(3, -1)
        )
        scores = (query @ key.transpose(2, 3)) / self.head_dim**0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, -1))


class Gated(nn.Module):
    """Two column layers with one input."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64, bias=False), nn.Linear(64, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.dropout(functional.silu(self.gate(hidden)) * self.up(hidden)))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.second, self.mlp = nn.LayerNorm(WIDTH), Gated(dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.first(hidden)))
        return hidden + self.mlp(self.second(hidden))


class Model(nn.Module):
    """A small language model."""

    def __init__(self, *, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


LAYERS = (
    Rule(patterns=(r".*qkv$",), shape=(3, -1)),
    Rule(patterns=(r".*attention\.out$",), partition_type="row"),
    Rule(patterns=(r".*(gate|up)\.weight$",)),
    Rule(patterns=(r".*down$",), partition_type="row"),
    Rule(patterns=(r".*mlp\.dropout$",), partition_type="dropout"),
)
WHOLE = Plan(
    rules=(
        *LAYERS,
        Rule(patterns=("words$",), partition_type="vocab"),
        Rule(patterns=("head$",), gather_output=True),
    )
)


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]  # of this rank
    wholes: dict[str, Tensor]  # on one rank, merged


def model_of(dtype: torch.dtype, **settings: Any) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Model(**settings).to(dtype)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (4, TOKENS), generator=generator) for _ in range(3)]


def train(model: Model, norm: Callable[[], float]) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = [], []
    for ids in batches():
        loss = model(ids)
        loss.backward()
        losses.append(loss.item())
        norms.append(norm())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def train_split(rank: int, whole: Model, num_blocks: int) -> Trained:
    group = dist.group.WORLD if dist.is_initialized() else None
    model = copy.deepcopy(whole)
    if rank:
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()  # the first rank's values count
    made = split(model, WHOLE, group=group, num_blocks=num_blocks)
    losses, norms = train(model, lambda: grad_norm(model, made, group=group))
    weights = {name: param.detach().clone() for name, param in model.named_parameters(remove_duplicate=False)}
    wholes = {}
    if group is None:
        wholes = {name: made.merged(name, [weights[part] for part in made.parts(name)]) for name in made.whole_names}
    return Trained(losses, norms, weights, wholes)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_ranks(dtype: torch.dtype, tied: bool) -> None:
    model = model_of(dtype, tied=tied)
    want = train_split(0, model, 4)
    assert len(set(want.losses)) == 3
    for size in (2, 4):
        got = on_threads(size, lambda rank: train_split(rank, model, 4))
        names = set()
        for one in got:
            assert (one.losses, one.norms) == (want.losses, want.norms)
            for name, weight in one.weights.items():
                assert torch.equal(weight, want.weights[name]), name
            names |= one.weights.keys()
        assert names == want.weights.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 2, 8])
def test_values_are_those_of_the_unsplit_model(num_blocks: int, tied: bool) -> None:
    whole = model_of(torch.float64, tied=tied)
    got = train_split(0, whole, num_blocks)

    def norm() -> float:
        return float(torch.stack([param.grad.square().sum() for param in whole.parameters()]).sum().sqrt())

    losses, norms = train(whole, norm)
    assert got.losses == pytest.approx(losses, rel=1e-12)
    assert got.norms == pytest.approx(norms, rel=1e-12)
    assert got.wholes.keys() == dict(whole.named_parameters()).keys()
    for name, weight in whole.named_parameters():
        assert torch.allclose(got.wholes[name], weight, rtol=1e-9, atol=1e-10), name


@given(
    num_blocks=st.sampled_from([1, 2, 4, 8]),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dim=st.integers(0, 1),
)
def test_blocks_put_together_are_the_whole(num_blocks: int, sizes: list[int], dim: int) -> None:
    sections = tuple(size * num_blocks for size in sizes)
    shape = [3, 3]
    shape[dim] = sum(sections)
    whole = torch.randn(shape)
    cut = Cut(dim, sections)
    blocks = [cut.block(whole, index, num_blocks) for index in range(num_blocks)]
    assert len({block.shape for block in blocks}) == 1
    assert all(block.is_contiguous() for block in blocks)
    assert torch.equal(cut.whole(blocks), whole)


class Layers(NamedTuple):
    """Drawn by hypothesis."""

    num_blocks: int
    num_ranks: int
    sections: int
    size: int  # of a section
    width: int
    rows: int
    bias: bool


@st.composite
def layers(draw: st.DrawFn) -> Layers:
    num_blocks = draw(st.sampled_from([1, 2, 4, 8]))
    num_ranks = draw(st.sampled_from([ranks for ranks in (1, 2, 4, 8) if ranks <= num_blocks]))
    sections, size, width, rows = draw(st.tuples(*(st.integers(1, 3) for _ in range(4))))
    return Layers(num_blocks, num_ranks, sections, size * num_blocks, width, rows, draw(st.booleans()))


class Product(nn.Module):
    """Works on each element by itself, and takes sections apart, as attention does."""

    def __init__(self, sections: int) -> None:
        super().__init__()
        self.sections = sections

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack(hidden.tanh().chunk(self.sections, -1)).prod(0)


@settings(max_examples=25)
@given(layers())
def test_column_and_row_layers_of_any_shape(case: Layers) -> None:
    """Against the unsplit pair in float64: outputs, and gradients of the input and of every parameter."""
    torch.manual_seed(7)
    whole = nn.Sequential(
        nn.Linear(case.width, case.sections * case.size, bias=case.bias),
        Product(case.sections),
        nn.Linear(case.size, case.width, bias=case.bias),
    ).double()
    plan = Plan(rules=(Rule(patterns=("0",), shape=(case.sections, -1)), Rule(patterns=("2",), partition_type="row")))
    sections = (case.size,) * case.sections
    value = torch.randn(case.rows, case.width, dtype=torch.float64)

    def run(_rank: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        group = dist.group.WORLD if dist.is_initialized() else None
        model = copy.deepcopy(whole)
        split(model, plan, group=group, num_blocks=case.num_blocks)
        own = value.clone().requires_grad_()
        out = model(own)
        out.sin().sum().backward()
        return out.detach(), own.grad, {name: param.grad for name, param in model.named_parameters()}

    found = [run(0)] if case.num_ranks == 1 else on_threads(case.num_ranks, run)
    given_value = value.clone().requires_grad_()
    out = whole(given_value)
    out.sin().sum().backward()
    cuts = {"0.weight": Cut(0, sections), "0.bias": Cut(0, sections), "2.weight": Cut(1, (case.size,))}
    grads: dict[str, Tensor] = {}
    for got, given_grad, own_grads in found:
        assert torch.allclose(got, out, rtol=1e-10, atol=1e-12)
        assert torch.allclose(given_grad, given_value.grad, rtol=1e-10, atol=1e-12)
        grads |= own_grads
    for name, param in whole.named_parameters():
        parts = [f"{name}_{index}" for index in range(case.num_blocks)] if name in cuts else [name]
        merged = cuts[name].whole([grads[part] for part in parts]) if name in cuts else grads[name]
        assert torch.allclose(merged, param.grad, rtol=1e-10, atol=1e-12), name


def test_gradients_at_the_borders() -> None:
    ranks, value = Ranks(), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: total([c * (k + 1) for k, c in enumerate(copies(x, 4, ranks))], ranks).sin(), value)
    assert check(lambda x: together([p.sin() * (k + 1) for k, p in enumerate(pieces(x, 4))], [1, 1]), value)
    assert check(lambda x: gathered(x, ranks), value)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sums_over_ranks_have_the_bits_of_the_tree(size: int) -> None:
    for numel in (1, 3, 64, 1001):
        terms = [torch.randn(numel, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
        want = tree_sum(terms)
        for got in on_threads(size, lambda rank, terms=terms: Ranks(dist.group.WORLD).sum(terms[rank])):
            assert torch.equal(got, want)


def test_one_sum_for_layers_with_one_input() -> None:
    """Gate and up share the copies of their input; another input has its own, and nothing is kept after the call."""
    sums = []
    model = Gated(0.0)
    split(model, Plan(rules=LAYERS[2:4]), num_blocks=2)
    ranks = model.gate._blocks.ranks
    plain = ranks.sum
    ranks.sum = lambda own: (sums.append(own.shape), plain(own))[1]
    for _ in range(2):
        model(torch.randn(3, WIDTH, requires_grad=True)).sum().backward()
    assert len(sums) == 4  # of two passes: the output, and the input's gradient
    assert model.gate._entrance._given is None


def drop(rank: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    size = dist.get_world_size() if dist.is_initialized() else 1
    ranks = Ranks(dist.group.WORLD if size > 1 else None)
    dropout = BlockDropout(0.4, Blocks(num_blocks, ranks), dim=1)
    value = torch.arange(1.0, 1 + 3 * 8 * 5).view(3, 8, 5).chunk(size, 1)[rank]
    return dropout(value), torch.rand(1)


def test_masks_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # the threads have torch's generator in common, whose number this stands for
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(1234))
    want, _ = drop(0, 4)
    assert 0.4 < (want != 0).double().mean() < 0.8
    first, second = (want != 0)[:, :2], (want != 0)[:, 2:4]
    assert not torch.equal(first, second)
    for size in (2, 4):
        got = on_threads(size, lambda rank: drop(rank, 4))
        assert torch.equal(torch.cat([one for one, _ in got], 1), want)
    kept = want[want != 0]
    value = torch.arange(1.0, 121.0).view(3, 8, 5)[want != 0]
    assert torch.allclose(kept, value / 0.6)
    monkeypatch.undo()
    assert not BlockDropout(1.0, Blocks(2, Ranks()))(torch.ones(4)).any()


def test_dropout_is_put_into_the_region() -> None:
    model = model_of(torch.float32, dropout=0.3)
    split(model, WHOLE, num_blocks=2)
    assert isinstance(model.blocks[0].mlp.dropout, BlockDropout)
    assert isinstance(model.blocks[0].dropout, nn.Dropout)
    ids = batches()[0]
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 3, padding_idx=5)


def test_a_padding_row_gets_no_gradient() -> None:
    model, ids = Padded(), torch.tensor([[0, 5, 5], [7, 6, 3]])
    with torch.no_grad():
        model.words.weight[5] = 2.0
    want = copy.deepcopy(model)
    made = split(model, Plan(rules=(Rule(patterns=("words",), partition_type="vocab"),)), num_blocks=4)
    got = model.words(ids)
    assert torch.equal(got, want.words(ids))
    got.sin().sum().backward()
    want.words(ids).sin().sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    assert torch.equal(
        made.merged("words.weight", [grads[part] for part in made.parts("words.weight")]), want.words.weight.grad
    )


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention.num_heads = HEADS


def test_attributes_that_count_heads_are_divided() -> None:
    plan = Plan(rules=LAYERS[:2], counts={"attention": ("num_heads",)})

    whole = Counted()

    def heads(_rank: int) -> int:
        model = copy.deepcopy(whole)
        split(model, plan, group=dist.group.WORLD, num_blocks=8)
        return model.attention.num_heads

    assert on_threads(4, heads) == [2] * 4
    with pytest.raises(ValueError, match=r"attention.size is to be divided by 1 ranks"):
        split(Counted(), Plan(rules=LAYERS[:2], counts={"attention": ("size",)}))


def broken(what: str) -> None:
    model: nn.Module = model_of(torch.float32, tied=what == "half a tie")
    plan, blocks = WHOLE, 2
    if what == "heads":
        plan, blocks = Plan(rules=LAYERS), 16
    elif what == "rows":
        model.blocks[0].mlp.gate = nn.Linear(WIDTH, 63)
    elif what == "pattern":
        plan = Plan(rules=(*LAYERS, Rule(patterns=("feet",))))
    elif what == "half a tie":
        plan = Plan(rules=(*LAYERS, Rule(patterns=("head",), gather_output=True)))
    elif what == "kind":
        plan = Plan(rules=(*LAYERS, Rule(patterns=("words",))))
    elif what == "meta":
        model.to("meta")
    elif what == "blocks":
        blocks = 3
    elif what == "sections":
        plan = Plan(rules=(Rule(patterns=(r".*qkv$",), shape=((8, 8), -1)),))
    elif what == "frequency":
        model.words.scale_grad_by_freq = True
    before = [*model.named_modules()]
    try:
        split(model, plan, num_blocks=blocks)
    finally:
        assert what == "frequency" or before == [*model.named_modules()]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("heads", "attention.qkv: 8 heads of 4 each cannot be cut into 16 equal blocks"),
        ("rows", "gate: 63 elements in dimension 0 cannot be cut into 2 equal blocks"),
        ("pattern", "no module of the model matches 'feet'; it has words, blocks.0.attention.qkv"),
        ("half a tie", "head.weight is to be split and is tied to words.weight, which is not"),
        ("kind", "words is to be split by column, which is for nn.Linear; got a Embedding"),
        ("meta", "words.weight is on the meta device"),
        ("blocks", "a power of two of blocks .* got 3"),
        ("sections", "is of 16 rows, and the layer has 96"),
        ("frequency", "words: scale_grad_by_freq=True needs the whole table"),
    ],
)
def test_what_cannot_be_split_is_refused(what: str, text: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=text):
        broken(what)


def misuse(_rank: int, what: str) -> str:
    group = dist.group.WORLD
    try:
        if what == "blocks":
            Blocks(2, Ranks(group))
        else:
            model = nn.Sequential(nn.Linear(4, 4))
            split(model, Plan(rules=(Rule(patterns=("0",), partition_type="row"),)), group=group)
            model(torch.ones(1, 4))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("size", "what", "text"),
    [
        (4, "blocks", "4 tensor-parallel ranks do not divide 2 blocks"),
        (3, "ranks", "a power of two of ranks (1, 2, 4, ...); got 3"),
        (2, "row", "a row layer takes this rank's 2 of 4 inputs"),
    ],
)
def test_wrong_numbers_of_ranks_and_inputs(size: int, what: str, text: str) -> None:
    assert all(text in said for said in on_threads(size, lambda rank: misuse(rank, what)))


def test_wrong_rules() -> None:
    with pytest.raises(ValueError, match="there is no preset 'lama'"):
        preset("lama")
    with pytest.raises(ValueError, match="needs a pattern"):
        Rule(patterns=())
    with pytest.raises(ValueError, match="row layers are cut along dimension 1; got 0"):
        Rule(patterns=("a",), partition_type="row", partition_dim=0)
    with pytest.raises(ValueError, match="shape and gather_output are for column layers"):
        Rule(patterns=("a",), partition_type="row", gather_output=True)
    with pytest.raises(ValueError, match=r"shape is \(number, -1\)"):
        Rule(patterns=("a",), shape=(3, 4))
