"""Deferred construction: the bits of eager construction, at no time more memory than shards and a unit."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import Transformer, micro_batch
from ds_testkit.state import State, assembled, assert_same_bits, exported
from ds_zero.deferred import is_deferred, materialised
from torch import Tensor, nn

from .helpers import make_optimizer


class Language(Transformer):
    """Initialised as GPT-2 is, with tied embeddings, buffers and tensors in plain attributes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.apply(self._init_weights)
        for name, param in self.named_parameters():
            if name.endswith("proj.weight"):
                param.data.normal_(mean=0.0, std=0.02 / math.sqrt(2 * len(self.blocks)))
        length = self.positions.num_embeddings
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length) > 0)
        self.register_buffer("index", torch.arange(length), persistent=False)
        self.first, self.scale = self.index[:2], torch.linspace(0, 1, 3)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, len(self.blocks))]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)


def language(**settings: Any) -> Language:
    torch.manual_seed(11)
    return Language(**settings)


def in_place() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[3].zero_()
        model[1].weight.mul_(0.5).add_(torch.randn(4, 4), alpha=0.1)
        model[1].weight.add_(model[1].weight)  # reads what it writes
        model[2].weight[:, 1:3].uniform_(-1, 1)
        model[2].weight.t()[0].copy_(model[2].bias)
        model[2].weight.copy_(model[2].weight.flip(0))
        torch.add(model[1].bias, 1.0, out=model[2].weight[0])
        torch._foreach_mul_([model[1].bias, model[2].bias], 3.0)
    return model


def initialisers() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(16, 24) for _ in range(9)), nn.Conv2d(24, 24, 3))
    linear: Any = model
    nn.init.trunc_normal_(linear[0].weight, std=0.02, a=-0.02, b=0.02)  # draws several times
    nn.init.trunc_normal_(linear[1].weight, a=2.0, b=3.0)  # the other of torch's two ways
    nn.init.orthogonal_(linear[2].weight)
    nn.init.kaiming_normal_(linear[3].weight, mode="fan_out")
    nn.init.xavier_uniform_(linear[4].weight)
    nn.init.sparse_(linear[5].weight, sparsity=0.3)
    nn.init.eye_(linear[6].weight)
    nn.init.constant_(linear[7].weight, 0.3)
    nn.init.normal_(linear[8].weight, generator=torch.Generator().manual_seed(4))
    nn.init.dirac_(linear[9].weight)
    with torch.no_grad():
        linear[8].bias.exponential_().log_().clamp_(-1, 1).erfinv_()
    return model


def functional() -> nn.Module:
    model = nn.Linear(2, 2)
    model.a = nn.Parameter(torch.cat([torch.randn(3, 5), torch.rand(2, 5)]) * 0.1)
    model.b = nn.Parameter(torch.stack([torch.eye(3), torch.full((3, 3), 2.0)]).sum(0))
    model.c = nn.Parameter(torch.linalg.qr(torch.randn(6, 6))[0].t())
    model.d = nn.Parameter(torch.randperm(6).float() + torch.randint(3, (6,)) + torch.bernoulli(torch.rand(6)))
    model.e = nn.Parameter(torch.randn_like(model.b) + torch.tensor([1.0, 2.0, 3.0]))
    model.f = nn.Parameter(torch.poisson(torch.full((4,), 3.0)), requires_grad=False)
    model.g = nn.Parameter(model.a[model.a > 0][:2].clone())  # a shape that depends on values
    if torch.rand(1).item() > 2 or bool((torch.randn(3) > 9).any()):
        raise AssertionError("values decide")
    model.h = nn.Parameter(torch.randn(0, 3))
    return model


def converted() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4)).half()
    model[0].double().float().to("cpu", torch.bfloat16)
    model[2] = copy.deepcopy(model[2]).float()
    model.add_module("weird", nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    return model


def seeded_within() -> nn.Module:
    first = nn.Linear(3, 3)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        second = nn.Linear(3, 3)
    state = torch.get_rng_state()
    third = nn.Linear(3, 3)
    torch.set_rng_state(state)
    return nn.Sequential(first, second, third, nn.Linear(3, 3))


BUILDERS = [language, in_place, initialisers, functional, converted, seeded_within]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: materialised(tensor) if is_deferred(tensor) else tensor.detach() for name, tensor in named}


@pytest.mark.parametrize("build", BUILDERS)
def test_same_bits_as_eager(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    want = values_of(build())
    state, drawn = torch.get_rng_state(), torch.rand(3)
    torch.manual_seed(3)
    with ds_zero.deferred():
        model = build()
    assert torch.equal(torch.get_rng_state(), state)
    got = values_of(model)
    assert torch.equal(torch.rand(3), drawn)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].stride() == value.stride(), name
        assert torch.equal(got[name], value), name
    held = {name for name, param in model.named_parameters() if not is_deferred(param)}
    assert held == ({"g"} if build is functional else set())  # its shape depended on values


def test_initialisation_after_the_block_counts() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, a=-0.5, b=0.5)
            module.bias.data[1:] = 7.0

    torch.manual_seed(3)
    eager = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).apply(init)
    torch.manual_seed(3)
    with ds_zero.deferred():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.apply(init)
    for got, want in zip(values_of(model).values(), eager.parameters(), strict=True):
        assert torch.equal(got, want)


def test_weights_can_be_loaded_before_sharding() -> None:
    saved = nn.Linear(4, 4).state_dict()
    with ds_zero.deferred():
        model = nn.Linear(4, 4)
        model.load_state_dict(saved)
    saved["weight"].zero_()
    ds_zero.shard(model, None)
    assert model.weight.abs().min() > 0
    assert torch.equal(model.bias, saved["bias"])


def test_the_model_is_an_ordinary_one_after_sharding() -> None:
    with ds_zero.deferred():
        model = language(tied=True)
        model.tokens.weight.no_decay = True
    given = list(model.parameters())
    ds_zero.shard(model, make_optimizer("AdamW"))
    assert all(a is b for a, b in zip(given, model.parameters(), strict=True))
    assert {type(param) for param in given} == {nn.Parameter}
    assert model.head.weight is model.tokens.weight
    assert model.tokens.weight.no_decay
    for tensor in (model.mask, model.index, model.first, model.scale):
        assert type(tensor) is Tensor
    model.index[0] = 5  # views go on to share memory
    assert model.first.tolist() == [5, 1]
    assert model.rates == language().rates


def built(rank: Rank, stage: int, compute: torch.dtype | None, lazy: bool) -> tuple[Any, Tensor, Any]:
    if lazy:
        with ds_zero.deferred():
            model = language(tied=True)
    else:
        model = language(tied=True)
    sharded = ds_zero.shard(
        model,
        make_optimizer("AdamW"),
        config=ds_zero.ZeroConfig(stage=stage),
        group=rank.group,
        precision=ds_zero.Precision(compute=compute),
    )
    state = torch.get_rng_state()
    start = exported(sharded)
    for index in range(rank.rank, 4, rank.size):
        model(micro_batch(index)).backward()
    sharded.step()
    return start, state, exported(sharded)


def all_built(rank: Rank, compute: torch.dtype | None) -> list[tuple[Any, Tensor, Any]]:
    return [built(rank, stage, compute, lazy=True) for stage in range(4)]


@pytest.mark.rung_c
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_on_any_ranks_at_any_stage(ranks: RankPool, compute: torch.dtype | None) -> None:
    start, state, trained = ranks.run(built, 0, compute, False, size=1)[0]
    for size in (1, 2, 4):
        results = ranks.run(all_built, compute, size=size)
        for stage in range(4):
            of_stage = [result[stage] for result in results]
            assert_same_bits(assembled(part[0] for part in of_stage), assembled([start]))
            assert_same_bits(assembled(part[2] for part in of_stage), assembled([trained]))
            assert all(torch.equal(part[1], state) for part in of_stage)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most bytes that ``work`` had allocated at once, as torch's profiler saw them."""
    gc.collect()  # what earlier tests left would be freed within, and count against the peak
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = work()
    live = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def construction(rank: Rank, stage: int, lazy: bool) -> tuple[int, int, int]:
    """Return the peak of building and sharding, and the bytes of the rank's shards and of the largest unit."""
    sizes: list[int] = []

    def work() -> Any:
        if lazy:
            with ds_zero.deferred():
                model = language(dim=64, layers=12, tied=True)
        else:
            model = language(dim=64, layers=12, tied=True)
        # the profiler does not see memory that ranks share
        config = ds_zero.ZeroConfig(stage=stage, host_memory=False)
        sharded = ds_zero.shard(model, make_optimizer("SGD"), config=config, group=rank.group)
        flats = [flat for unit in sharded._units for flat in unit.flats]
        sizes.extend(
            [sum(4 * flat.layout.shard_numel for flat in flats), max(4 * flat.layout.length for flat in flats)]
        )
        return sharded

    peak = peak_bytes(work)
    return peak, sizes[0], sizes[1]


@pytest.mark.rung_c
def test_no_rank_holds_more_than_shards_and_a_unit(ranks: RankPool) -> None:
    for peak, shards, unit in ranks.run(construction, 3, True):
        assert shards < peak < shards + 1.5 * unit < 4 * shards
    for peak, shards, _ in ranks.run(construction, 3, False):
        assert peak > 4 * shards  # what it is compared with is seen by the same measurement


def differing(rank: Rank, what: str, **nodes: int) -> str:
    torch.manual_seed(rank.rank if what == "seed" else 0)
    with ds_zero.deferred():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=what != "bias" or rank.rank != 2))
        if what == "constant":
            nn.init.constant_(model[1].weight, 1.0 if rank.rank == 1 else 0.0)
    if what == "data":  # 1.4 MB of it, made outside
        data = torch.full((600, 600), float(rank.rank == 3))
        with ds_zero.deferred():
            model = nn.Sequential(nn.Linear(600, 600))
            model[0].weight.data.copy_(data)
    with pytest.raises(ValueError) as error:
        ds_zero.shard(model, None, config=ds_zero.ZeroConfig(stage=3, **nodes), group=rank.group)
    return str(error.value)


@pytest.mark.rung_c
def test_ranks_that_build_different_models_are_named(ranks: RankPool) -> None:
    for text in ranks.run(differing, "seed"):
        assert (
            "the models of ranks [1, 2, 3] differ from rank 0's in '0.weight', '0.bias', '1.weight', '1.bias'" in text
        )
        assert "torch.manual_seed" in text
    assert "ranks [1] differ from rank 0's in '1.weight'." in ranks.run(differing, "constant")[3]
    by_node = partial(differing, mics_shard_size=2)  # where shards stand in another order
    assert "ranks [1] differ from rank 0's in '1.weight'." in ranks.run(by_node, "constant")[3]
    assert "ranks [3] differ from rank 0's in '0.weight'" in ranks.run(differing, "data")[1]
    assert (
        "ranks [2] differ from rank 0's in their numbers of parameters and buffers: 4, 4, 3, 4"
        in (ranks.run(differing, "bias")[0])
    )


def on_meta(rank: Rank) -> tuple[Any, bool]:
    torch.manual_seed(2)
    eager = Transformer(tied=True)
    torch.manual_seed(2)
    with torch.device("meta"):
        model = Transformer(tied=True)
    sharded = ds_zero.shard(model, None, config=ds_zero.ZeroConfig(stage=3), group=rank.group)
    torch.manual_seed(2)
    for module in eager.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    want = {("param", name): param.detach().reshape(-1) for name, param in eager.named_parameters()}
    return exported(sharded), want


@pytest.mark.rung_c
def test_modules_on_the_meta_device_are_reset(ranks: RankPool) -> None:
    results = ranks.run(on_meta, size=2)
    want: State = results[0][1]
    assert_same_bits(assembled(pieces for pieces, _ in results), want)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Forgetful(Bare):
    def reset_parameters(self) -> None:
        pass


def test_errors_say_what_to_do() -> None:
    with torch.device("meta"):
        bare, forgetful = nn.Sequential(nn.Linear(2, 2), Bare()), Forgetful()
    with pytest.raises(ValueError, match=r"module '1' \(Bare\) is on the meta device with weight and has no"):
        ds_zero.shard(bare, None)
    with pytest.raises(ValueError, match=r"of module '.root.' .Forgetful. leaves 'weight' without values"):
        ds_zero.shard(forgetful, None)
    with ds_zero.deferred(), pytest.raises(RuntimeError, match="nothing has memory: leave it first"):
        ds_zero.shard(nn.Linear(2, 2), None)
    with ds_zero.deferred():
        hooked = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"resize_ of a deferred tensor of shape .2. cannot be recorded"):
        hooked[1].bias.data.resize_(3)
    with pytest.raises(RuntimeError, match="has no data to save"):
        copy.copy(hooked[1].bias).__reduce_ex__(2)
    hook = hooked[1].weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match=r"would be lost: 1.weight; register them after"):
        ds_zero.shard(hooked, None)
    assert all(is_deferred(param) for param in hooked.parameters()), "nothing has been begun"
    hook.remove()
    big = torch.ones(1 << 19)
    with ds_zero.deferred():
        model = nn.Linear(1 << 19, 1, bias=False)
        model.weight.data.copy_(big)
    big.zero_()
    with pytest.raises(RuntimeError, match="changed in place since"):
        ds_zero.shard(model, None)


def test_every_in_place_draw_of_torch_is_known_as_random() -> None:
    for name in (
        "normal_",
        "uniform_",
        "random_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
        "bernoulli_",
    ):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            if overload.endswith("out"):
                continue
            assert torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags, (name, overload)


def test_a_long_chain_of_writes_is_no_deep_recursion() -> None:
    with ds_zero.deferred():
        table = torch.zeros(2000, 2)
        for index in range(2000):
            table[index] = index
    assert torch.equal(materialised(table)[:, 1], torch.arange(2000.0))
