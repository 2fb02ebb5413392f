"""Stochastic rounding: right on average, even bits, the same ones however arrays are cut and on every backend."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from ds_kernels import AdamHyper, AdamW
from ds_kernels.backends.checks import Beside
from ds_kernels.backends.plain.stochastic import key_of, random_bits, round_to_bfloat16
from ds_kernels.hyper import LionHyper
from ds_kernels.optim import FusedAdagrad, FusedAdam, FusedLamb, FusedLion, FusedSGD, StochasticRounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

CPU = torch.device("cpu")
LONG = 70_001
OWN = {FusedSGD: {"momentum": 0.9}}
kinds = pytest.mark.parametrize("kind", [FusedAdam, FusedLamb, FusedLion, FusedAdagrad, FusedSGD])


@pytest.fixture
def backend(backend):
    """Every backend that rounds stochastically."""
    if backend.find("rounded_adamw", CPU, torch.float32) is None:
        pytest.skip(f"the backend {backend.name} does not round stochastically")
    return backend


# Rounding #


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers at or below ``abs(x)`` and next above it, with the sign of ``x``."""
    bits = x.view(torch.int32)
    return (bits & -0x10000).view(torch.float32), ((bits & -0x10000) + 0x10000).view(torch.float32)


def test_a_number_becomes_one_of_its_neighbours():
    x = torch.randint(-(2**31), 2**31, (500_000,)).to(torch.int32).view(torch.float32)
    rounded = round_to_bfloat16(x, key_of(1)).float()
    low, high = neighbours(x)
    number = ~x.isnan()
    assert torch.equal(rounded.isnan(), x.isnan())
    held = number & (x.view(torch.int32) & 0xFFFF == 0)  # what bfloat16 holds, infinities among it
    assert torch.equal(rounded[held], x[held])
    assert ((rounded == low) | (rounded == high))[number].all()
    assert (rounded == high)[number & ~held].any()


@pytest.mark.parametrize("value", [1 + 2**-9, 1 + 2**-16, -3.7, 1e-30, 1e-40, 12345.678])
def test_the_mean_is_the_number(value):
    numel = 1 << 18
    x = torch.full((numel,), value)
    low, high = neighbours(x[:1])
    odds = float((x[0].double() - low) / (high.double() - low))
    ups = int((round_to_bfloat16(x, key_of(7)).float() == high).sum())
    assert abs(ups - odds * numel) <= 4 * (odds * (1 - odds) * numel) ** 0.5 + 1


def test_the_mean_over_steps_is_the_number():
    x = torch.randn(4096)
    steps = 400
    mean = sum(round_to_bfloat16(x, key_of(0, 3, step)).double() for step in range(steps)) / steps
    low, high = neighbours(x)
    spread = (high - low).abs().double() / 2 / steps**0.5  # at least the standard deviation of the mean
    assert ((mean - x).abs() <= 5 * spread).all()
    assert ((mean - x) / spread).mean().abs() <= 4 / x.numel() ** 0.5


def test_bits_are_spread_evenly_and_independently():
    numel = 1 << 16
    streams = [random_bits(numel, key_of(*parts)) for parts in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1))]
    streams.append(random_bits(numel, key_of(0, 0, 1, first=numel)))
    halves = torch.stack([stream >> 16 for stream in streams])
    for row in halves:
        counts = torch.bincount(row >> 8, minlength=256).double()
        expected = numel / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) <= 5 * (2 * 255) ** 0.5
    bits = ((halves[:, :, None] >> torch.arange(16)) & 1).float().mul_(2).sub_(1)
    assert (bits.mean(1).abs() <= 5 / numel**0.5).all()
    rows = (halves.double() + 0.5) / 65536 * 12**0.5 - 3**0.5  # mean 0, variance 1
    between = rows @ rows.T / numel - torch.eye(len(rows))
    apart = [(row[:-gap] * row[gap:]).mean() for row in rows for gap in (1, 2, 16, 32, 512, 4096)]
    assert between.abs().max() <= 5 / numel**0.5
    assert torch.stack(apart).abs().max() <= 5 / numel**0.5


@given(cuts=st.lists(st.integers(0, 1000), max_size=3).map(sorted), first=st.sampled_from([0, 5, 2**32 - 300, 2**40]))
@settings(max_examples=25, deadline=None)
def test_parts_have_the_bits_of_the_whole(cuts, first):
    x = torch.randn(1000)
    whole = round_to_bfloat16(x, key_of(2, first=first))
    edges = [0, *cuts, 1000]
    parts = [round_to_bfloat16(x[a:b], key_of(2, first=first + a)) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


# Steps #


@dataclasses.dataclass
class Stored:
    """A bfloat16 parameter without a master, and moments of one type."""

    param: Tensor
    moments: list[Tensor]

    @classmethod
    def of(cls, state, dtype) -> Stored:
        return cls(
            state.param.bfloat16(), [moment.to(dtype, copy=True) for moment in (state.exp_avg, state.exp_avg_sq)]
        )

    def keys(self, first: int = 0) -> dict[str, Tensor]:
        keys = {"param": key_of(9, 0, first=first)}
        if self.moments[0].dtype == torch.bfloat16:
            keys |= {"exp_avg": key_of(9, 1, first=first), "exp_avg_sq": key_of(9, 2, first=first)}
        return keys

    def part(self, part: slice) -> Stored:
        return Stored(self.param[part].clone(), [moment[part].clone() for moment in self.moments])

    def run(self, backend, grad: Tensor, hyper: AdamHyper, first: int = 0) -> Stored:
        step = backend.find("rounded_adamw", CPU, self.param.dtype)
        step(self.param, grad, *self.moments, hyper=hyper, beside=Beside(keys=self.keys(first)))
        return self

    def same_bits(self, other: Stored) -> bool:
        pairs = zip([self.param, *self.moments], [other.param, *other.moments])
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


moment_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@moment_types
@pytest.mark.parametrize("numel", [0, 1, 33, 512, 1100, LONG])
@pytest.mark.parametrize("first", [0, 2**32 - 700])
def test_a_step_is_the_float32_step_rounded(backend, adam_state, hyper, dtype, numel, first):
    state = adam_state(numel, torch.bfloat16)
    stored = Stored.of(state, dtype)
    param, m, v = (x.to(torch.float32, copy=True) for x in (stored.param, *stored.moments))
    backend.find("adamw", CPU, torch.float32)(param, state.grad, m, v, copy=None, hyper=hyper)
    stored.run(backend, state.grad, hyper, first)
    keys = stored.keys(first)
    assert torch.equal(stored.param, round_to_bfloat16(param, keys["param"]))
    if dtype == torch.bfloat16:
        assert torch.equal(stored.moments[0], round_to_bfloat16(m, keys["exp_avg"]))
        assert torch.equal(stored.moments[1], round_to_bfloat16(v, keys["exp_avg_sq"]))


@moment_types
def test_the_same_bits_on_every_instruction_set_and_two_threads(cpu_isas, adam_state, hyper, threads, dtype):
    state = adam_state(LONG, torch.bfloat16)
    start = Stored.of(state, dtype)
    results = []
    for num in (1, 2):
        threads(num)
        results += [start.part(slice(None)).run(backend, state.grad, hyper) for backend in cpu_isas]
    assert all(result.same_bits(results[0]) for result in results)


@moment_types
def test_shards_of_any_cut_have_the_bits_of_the_whole(backend, adam_state, hyper, dtype):
    state = adam_state(3000, torch.bfloat16)
    start = Stored.of(state, dtype)
    whole = start.part(slice(None)).run(backend, state.grad, hyper)
    for cut in (1, 517, 1024):
        for part in (slice(0, cut), slice(cut, 3000)):
            shard = start.part(part).run(backend, state.grad[part], hyper, first=part.start)
            assert shard.same_bits(whole.part(part))


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (Beside(torch.zeros(8, dtype=torch.int16), keys={"param": key_of(0)}), "completed by low or rounded by"),
        (Beside(keys={"param": torch.zeros(2)}), "must be two contiguous int64 numbers.*got torch.float32"),
        (Beside(keys={"param": key_of(0), "exp_avg": key_of(0)}), r"must be bfloat16; got torch.float32; drop the key"),
        (Beside(keys={"param": key_of(0), "lost": key_of(0)}), "got no array lost"),
    ],
)
def test_keys_must_fit(backend, beside, message):
    step = backend.find("rounded_lion", CPU, torch.bfloat16)
    param = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        step(param, torch.zeros(8), torch.zeros(8), hyper=LionHyper(lr=0.1), beside=beside)


# Optimizers #


def weight(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.bfloat16())


def train(optimizer, steps: int, first: int = 0, part: slice = slice(None)):
    for step in range(first, first + steps):
        for number, param in enumerate(optimizer.param_groups[0]["params"]):
            generator = torch.Generator().manual_seed(100 * step + number)
            param.grad = torch.randn(1000, generator=generator).to(param.dtype)[part]
        optimizer.step()
    return optimizer


@kinds
def test_a_shard_trains_as_the_whole_does(backend, kind):
    if kind is FusedLamb:
        pytest.skip("LAMB's norms are those of whole tensors")
    settings_ = {"lr": 1e-3, "moments": "bf16", "rounding": StochasticRounding(seed=4), **OWN.get(kind, {})}
    start = torch.randn(1000)
    whole = [weight(start), weight(start)]
    train(kind(whole, kernels=backend, **settings_), 4)
    assert not torch.equal(whole[0], whole[1])
    part = slice(300, 811)
    shard = weight(start[part])
    optimizer = kind([shard], kernels=backend, **settings_)
    optimizer.place(shard, 0, first=part.start)
    train(optimizer, 4, part=part)
    assert torch.equal(shard, whole[0][part])


@kinds
def test_a_resumed_or_copied_optimizer_goes_on_with_the_same_bits(kind):
    settings_ = {"lr": 1e-3, "moments": "bf16", "rounding": StochasticRounding(), **OWN.get(kind, {})}
    straight = train(kind([weight(torch.linspace(-1, 1, 1000))], **settings_), 3)
    [param] = straight.param_groups[0]["params"]
    assert "master_low" not in straight.state[param]
    resumed_param = nn.Parameter(param.detach().clone())
    resumed = kind([resumed_param], **settings_)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    copied = copy.deepcopy(straight)
    train(resumed, 3, 3)
    train(copied, 3, 3)
    train(straight, 3, 3)
    assert torch.equal(resumed_param, param)
    assert torch.equal(copied.param_groups[0]["params"][0], param)


def test_states_go_between_masters_and_rounding():
    exact = train(AdamW([weight(torch.ones(1000))]), 2)
    [param] = exact.param_groups[0]["params"]
    rounded = AdamW([nn.Parameter(param.detach().clone())], rounding=StochasticRounding())
    rounded.load_state_dict(copy.deepcopy(exact.state_dict()))
    train(rounded, 1, 2)
    back = AdamW([nn.Parameter(rounded.param_groups[0]["params"][0].detach().clone())])
    back.load_state_dict(copy.deepcopy(rounded.state_dict()))
    train(back, 1, 3)
    [param] = back.param_groups[0]["params"]
    assert back.state[param]["step"] == 4
    assert back.state[param]["master_low"].count_nonzero()


def test_float32_parameters_with_float32_moments_are_not_touched():
    start = torch.randn(1000)
    plain, rounded = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    train(AdamW([plain], lr=1e-3), 2)
    train(AdamW([rounded], lr=1e-3, rounding=StochasticRounding()), 2)
    assert torch.equal(rounded, plain)


def test_small_steps_and_slow_decay_are_not_lost():
    param = weight(torch.ones(20_000))
    settings_ = {"lr": 1e-4, "weight_decay": 0.0, "moments": "bf16"}
    optimizer = AdamW([param], **settings_, rounding=StochasticRounding())
    for _ in range(50):  # 50 steps of 1e-4, each 1/40 of the distance to the next bfloat16
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.float().mean().item() == pytest.approx(1 - 50e-4, abs=2e-4)
    param.grad = torch.zeros_like(param)
    before = optimizer.state[param]["exp_avg_sq"].float().mean()
    for _ in range(100):
        optimizer.step()
    after = optimizer.state[param]["exp_avg_sq"].float().mean()
    assert (after / before).item() == pytest.approx(0.999**100, rel=5e-3)  # to nearest it would stay 1


def test_a_place_must_make_sense():
    param = weight(torch.ones(4))
    optimizer = AdamW([param], rounding=StochasticRounding())
    with pytest.raises(ValueError, match="got -1 for one of shape"):
        optimizer.place(param, 0, first=-1)
    with pytest.raises(ValueError, match="not known here"):
        optimizer.place(weight(torch.ones(4)), 0, first=0)
