"""How splitting starts: rules, what is refused before anything is changed, and what is freed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ds_pipe.tensor import Blocks, ColumnParallelLinear, Plan, Ranks, Rule, preset, split
from ds_pipe.tensor.blocks import Cut
from ds_pipe.tensor.config import PartitionConfig, TensorConfig
from ds_pipe.tensor.plan import HEAD_SIZES
from ds_pipe.tensor.plan import VOCABULARY as VOCABULARY_RULES
from ds_testkit.threads import on_threads
from torch import nn

from .split_models import HEADS, LAYERS, WHOLE, WIDTH, Attention, Model, batches, model_of


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
    with pytest.raises(
        ValueError, match=r"counts names 'size' of attention, which has none; its numbers are head_dim, num_heads"
    ):
        split(Counted(), Plan(rules=LAYERS[:2], counts={"attention": ("size",)}))


def tie_projections(model: Model) -> None:
    model.blocks[1].attention.qkv.weight = model.blocks[0].attention.qkv.weight


def make_uneven(model: Model) -> None:
    model.blocks[0].mlp.gate = nn.Linear(WIDTH, 63)


def tie_head(model: Model) -> None:
    model.head.weight = model.words.weight


def with_setting(name: str, value: object) -> Callable[[Model], object]:
    return lambda model: setattr(model.words, name, value)


class Refused(NamedTuple):
    """What is wrong with a model, a plan or a number of blocks."""

    text: str
    plan: Plan = WHOLE
    num_blocks: int = 2
    change: Callable[[Model], object] = lambda _: None


REFUSED = {
    "heads": Refused("attention.qkv: 8 heads of 4 each cannot be cut into 16 equal blocks", Plan(rules=LAYERS), 16),
    "rows": Refused("gate: 63 elements in dimension 0 cannot be cut into 2 equal blocks", change=make_uneven),
    "half a tie": Refused(
        "head.weight is to be split and is tied to words.weight, which is not",
        Plan(rules=(*LAYERS, Rule(patterns=("head",), gather_output=True))),
        change=tie_head,
    ),
    "two cuts": Refused(
        r"1.attention.qkv.weight is tied to a weight that is split along dimension 0 into sections \[32, 32, 32\]",
        Plan(rules=(Rule(patterns=("blocks.0.*qkv$",), shape=(3, -1)), Rule(patterns=("blocks.1.*qkv$",)))),
        change=tie_projections,
    ),
    "kind": Refused(
        "words is to be split by column, which is for nn.Linear; got a Embedding",
        Plan(rules=(*LAYERS, Rule(patterns=("words",)))),
    ),
    "meta": Refused("words.weight is on the meta device", change=lambda model: model.to("meta")),
    "blocks": Refused("a power of two of blocks .* got 3", num_blocks=3),
    "no blocks": Refused("a power of two of blocks .* got 0", num_blocks=0),
    "sections": Refused(
        "is of 16 rows, and the layer has 96", Plan(rules=(Rule(patterns=(".*qkv$",), shape=((8, 8), -1)),))
    ),
    "gathered sections": Refused(
        "blocks.0.attention.qkv: outputs of 3 sections are not gathered",
        Plan(rules=(*LAYERS[1:], Rule(patterns=(".*qkv$",), shape=(3, -1), gather_output=True))),
    ),
    "count": Refused(
        "counts names 'length' of the model, which has none; its numbers are size",
        Plan(rules=LAYERS, counts={"": ("size", "length")}),
        change=lambda model: setattr(model, "size", 3),
    ),
    **{
        name: Refused(f"words: {name}={value} needs the whole table", change=with_setting(name, value))
        for name, value in (("scale_grad_by_freq", True), ("max_norm", 2.0), ("sparse", True))
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_split_is_refused_and_stays_as_it_is(what: str) -> None:
    model, case = model_of(torch.float32), REFUSED[what]
    case.change(model)
    before = [(name, each, dict(vars(each))) for name, each in model.named_modules()]
    params = dict(model.named_parameters())
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=case.text):
        split(model, case.plan, num_blocks=case.num_blocks)
    assert before == [(name, each, vars(each)) for name, each in model.named_modules()]
    after = dict(model.named_parameters())
    assert params.keys() == after.keys()
    assert all(params[name] is after[name] for name in params)


def test_the_names_in_a_message_can_be_used() -> None:
    """Of everything that a rule can be for, split or not; 20 at most."""
    model = model_of(torch.float32)
    with pytest.raises(ValueError, match="no module") as caught:
        split(model, Plan(rules=(*LAYERS, Rule(patterns=("feet", "arms"), partition_type="vocab"))))
    layers = ["attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down", "mlp.dropout", "dropout"]
    listed = ["words", *(f"blocks.{block}.{layer}" for block in range(2) for layer in layers), "head"]
    assert str(caught.value) == (
        f"no module of the model matches 'feet', 'arms'; it has {', '.join(listed)}: patterns are matched from the "
        "start of a name"
    )
    for name in listed:
        assert Rule(patterns=(f"{name}$",)).matches(name)
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(22)))
    with pytest.raises(ValueError, match=r"it has 0, 1, .*, 18, 19 and 2 more: patterns"):
        split(many, Plan(rules=(Rule(patterns=("feet",)),)))


@pytest.mark.parametrize("name", HEAD_SIZES)
def test_heads_are_not_cut_where_their_size_is_known(name: str) -> None:
    for stay, own, blocks, refused in ((None, 4, 8, False), (None, 4, 16, True), (4, None, 16, True)):
        model = nn.Module()
        model.attention = Attention()
        del model.attention.head_dim
        if own is not None:
            setattr(model.attention, name, own)
        rules = (Rule(patterns=(".*qkv",), shape=(3, -1), together=stay),)
        if refused:
            with pytest.raises(ValueError, match="8 heads of 4 each cannot be cut into 16 equal blocks"):
                split(model, Plan(rules=rules), num_blocks=blocks)
        else:
            split(model, Plan(rules=rules), num_blocks=blocks)


def test_what_was_split_is_freed() -> None:
    model = model_of(torch.float32, tied=True, dropout=0.1)
    names = {name: weakref.ref(param) for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    made = split(model, WHOLE, num_blocks=2)
    assert all(ref() is not None for ref in names.values())  # the optimizer has them still
    optimizer.param_groups[0]["params"] = made.renewed(optimizer.param_groups[0]["params"])
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, model.parameters())}
    gc.collect()
    alive = {name for name, ref in names.items() if ref() is not None}
    assert alive == {name for name in names if made.parts(name) == [name]} == alive & {*made.whole_names}
    assert "words.weight" not in alive
    assert "blocks.0.mlp.down.bias" in alive
    assert model(batches()[0]).isfinite()


def test_layers_made_by_hand_do_not_keep_what_they_are_made_of() -> None:
    blocks, linear = Blocks(2, Ranks()), nn.Linear(4, 8)
    weight, layer = weakref.ref(linear.weight), ColumnParallelLinear(linear, blocks)
    assert blocks.of(linear.weight, Cut(0, (8,)), "weight") == [layer.weight_0, layer.weight_1]
    del linear
    gc.collect()
    assert weight() is None
    assert [name for name, _ in copy.deepcopy(layer).named_parameters()] == ["weight_0", "weight_1", "bias_0", "bias_1"]


class Planned(NamedTuple):
    """What a section says."""

    rules: tuple[Rule, ...]
    defaults: tuple[Rule, ...]


LLAMA = preset("llama").rules


@pytest.mark.parametrize(
    ("section", "by_default", "want"),
    [
        ({}, True, Planned(LLAMA, ())),
        ({"layer_specs": LAYERS}, True, Planned(LAYERS, LLAMA)),
        ({"layer_specs": LAYERS}, False, Planned(LAYERS, ())),
        ({"preset_model": "llama"}, False, Planned(LLAMA, ())),
        ({"vocab_parallel_lm_head": True}, False, Planned(VOCABULARY_RULES, ())),
        ({"vocab_parallel_lm_head": True}, True, Planned((*LLAMA, *VOCABULARY_RULES), ())),
    ],
)
def test_rules_by_default(section: dict[str, Any], by_default: bool, want: Planned) -> None:
    rest = {key: value for key, value in section.items() if key != "layer_specs"}
    partition = PartitionConfig(use_default_specs=by_default, layer_specs=section.get("layer_specs", ()))
    plan = TensorConfig(autotp_size=2, partition_config=partition, **rest).plan()
    assert (plan.rules, plan.defaults) == want


def test_a_section_without_rules() -> None:
    with pytest.raises(ValueError, match="no rule says what to split, and use_default_specs is false"):
        TensorConfig(autotp_size=2, partition_config=PartitionConfig(use_default_specs=False))


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
