"""Layers split into blocks: the unsplit model's values, and the same bits on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ds_pipe.tensor import BlockDropout, Blocks, Plan, Ranks, Rule, grad_norm, split
from ds_pipe.tensor.blocks import Cut
from ds_pipe.tensor.functions import copies, gathered, pieces, together, total
from ds_pipe.tensor.sums import tree_sum
from ds_testkit.threads import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .split_models import LAYERS, VOCABULARY, WHOLE, WIDTH, Gated, Model, batches, model_of


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]  # of this rank
    wholes: dict[str, Tensor]  # on one rank, merged


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
    ranks = model.gate._share.ranks
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


@pytest.mark.parametrize("ids", [[24], [3, -1], [0, 23, 100]])
def test_ids_out_of_range(ids: list[int]) -> None:
    """On every rank, whatever blocks it has, as the whole table does."""
    whole, given = nn.Sequential(nn.Embedding(VOCABULARY, 3)), torch.tensor(ids)
    plan = Plan(rules=(Rule(patterns=("0",), partition_type="vocab"),))

    def look_up(_rank: int) -> str:
        group = dist.group.WORLD if dist.is_initialized() else None
        model = copy.deepcopy(whole)
        split(model, plan, group=group, num_blocks=4)
        with pytest.raises(IndexError) as caught:
            model(given)
        return str(caught.value)

    with pytest.raises(IndexError):
        whole(given)
    want = f"ids are from 0 to 23, the rows of the table; got from {min(ids)} to {max(ids)}"
    assert {look_up(0), *on_threads(2, look_up)} == {want}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler
def test_split_layers_are_compiled_as_one_graph() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    kinds = ("vocab", "column", "column", "row")
    plan = Plan(rules=tuple(Rule(patterns=(f"{at}$",), partition_type=kinds[at]) for at in (0, 1, 3)))
    split(model, plan, num_blocks=2)
    ids, params = torch.tensor([1, 7, 7]), [*model.parameters()]
    want = torch.autograd.grad(model(ids).square().sum(), params)
    got = torch.autograd.grad(torch.compile(model, backend="aot_eager", fullgraph=True)(ids).square().sum(), params)
    assert all(torch.allclose(first, second) for first, second in zip(got, want, strict=True))
