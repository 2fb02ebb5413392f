"""State in fewer bytes: what each codec keeps, the same bits from every kernel, and steps through it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ds_kernels import AdamHyper
from ds_kernels.backends.checks import Beside
from ds_kernels.backends.plain import state_codecs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LONG = 70_001


@pytest.fixture
def backend(backend):
    """Every backend that has more than AdamW in float32."""
    if backend.find("coded_adamw", torch.device("cpu"), torch.float32) is None:
        pytest.skip(f"the backend {backend.name} has AdamW in float32 only")
    return backend


def all_kinds_of_floats(numel: int) -> Tensor:
    """Random bits: every exponent, subnormals, infinities and NaNs."""
    return torch.randint(-(2**31), 2**31, (numel,)).to(torch.int32).view(torch.float32)


def test_split_is_exact_and_rounds_to_nearest():
    x = all_kinds_of_floats(1_000_000)
    high, low = state_codecs.split(x)
    back = state_codecs.join(high, low)
    number = ~x.isnan()
    assert torch.equal(back[number].view(torch.int32), x[number].view(torch.int32))
    assert torch.equal(back.isnan(), x.isnan())
    assert torch.equal(high.isnan(), x.isnan())
    ties = low == -(2**15)
    assert torch.equal(high[number & ~ties], x.bfloat16()[number & ~ties])
    assert state_codecs.join(*state_codecs.split(torch.tensor([-0.0]))).signbit()


@pytest.mark.parametrize(
    ("encode", "spread"), [(state_codecs.encode_signed, 1 / 64), (state_codecs.encode_roots, 1 / 110)]
)
def test_codes_of_8_bits_are_near_what_they_stand_for(encode, spread):
    x = torch.randn(4099) * torch.exp(2 * torch.randn(4099)) * 1e-9
    x = x if encode is state_codecs.encode_signed else x.square()
    back = state_codecs.decode(*encode(x))
    padded = torch.nn.functional.pad(x, (0, -x.numel() % 32)).view(-1, 32)
    largest = padded.abs().amax(1).repeat_interleave(32)[: x.numel()]
    assert ((back - x).abs() <= spread * largest).all()
    assert ((back != 0) | (x == 0)).all() or encode is state_codecs.encode_signed


def test_decoded_signed_moments_are_encoded_to_the_same_codes():
    x = torch.randn(32 * 500) * torch.exp(4 * torch.randn(500)).repeat_interleave(32)
    codes, scale = state_codecs.encode_signed(x)
    again, scale_again = state_codecs.encode_signed(state_codecs.decode(codes, scale))
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, scale)


@pytest.mark.parametrize("encode", [state_codecs.encode_signed, state_codecs.encode_roots])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_no_number_spreads_over_its_group_only(encode, bad):
    x = torch.ones(96)
    x[40] = bad
    back = state_codecs.decode(*encode(x))
    assert back[32:64].isnan().all()
    assert torch.equal(back[:32], x[:32])
    assert torch.equal(back[64:], x[64:])


def test_zeros_stay_zeros():
    for encode in (state_codecs.encode_signed, state_codecs.encode_roots):
        assert not state_codecs.decode(*encode(torch.zeros(33))).count_nonzero()


# Steps #


@dataclasses.dataclass
class Coded:
    """A parameter and its moments, stored in one of the ways."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    beside: Beside

    @classmethod
    def of(cls, state, moments: str) -> Coded:
        param, low = state_codecs.split(state.param)
        if moments == "int8":
            m, m_scale = state_codecs.encode_signed(state.exp_avg)
            v, v_scale = state_codecs.encode_roots(state.exp_avg_sq)
            return cls(param, m, v, Beside(low, {"exp_avg": m_scale, "exp_avg_sq": v_scale}))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[moments]
        return cls(param, state.exp_avg.to(dtype, copy=True), state.exp_avg_sq.to(dtype, copy=True), Beside(low))

    def clone(self) -> Coded:
        scales = {name: scale.clone() for name, scale in self.beside.scales.items()}
        tensors = [t.clone() for t in (self.param, self.exp_avg, self.exp_avg_sq)]
        return Coded(*tensors, Beside(self.beside.low.clone(), scales))

    def run(self, backend, grad, hyper) -> Coded:
        step = backend.find("coded_adamw", self.param.device, self.param.dtype)
        step(self.param, grad, self.exp_avg, self.exp_avg_sq, hyper=hyper, beside=self.beside)
        return self

    def stored(self) -> list[Tensor]:
        return [self.param, self.exp_avg, self.exp_avg_sq, self.beside.low, *self.beside.scales.values()]

    def values(self) -> list[Tensor]:
        scales = self.beside.scales
        return [
            state_codecs.decode(self.param, self.beside.low),
            state_codecs.decode(self.exp_avg, scales.get("exp_avg")),
            state_codecs.decode(self.exp_avg_sq, scales.get("exp_avg_sq")),
        ]

    def same_bits(self, other: Coded) -> bool:
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(self.stored(), other.stored()))


ways = pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("numel", [1, 1021, LONG])
def test_a_split_master_gives_the_bits_of_a_float32_one(backend, adam_state, numel, decoupled):
    state = adam_state(numel, torch.bfloat16)
    split = Coded.of(state, "fp32")
    for step in range(1, 4):
        hyper = AdamHyper(step=step, lr=1e-3, weight_decay=0.1, decoupled=decoupled)
        split.run(backend, state.grad, hyper)
        state.run(backend, hyper)
        assert all(map(torch.equal, split.values(), state.results()))


@ways
@pytest.mark.parametrize("numel", [1, 31, 33, 1100, LONG])
def test_a_coded_step_is_the_step_of_what_the_codes_stand_for(cpu_isas, adam_state, hyper, moments, numel):
    state = adam_state(numel, torch.bfloat16)
    coded = Coded.of(state, moments)
    plain = dataclasses.replace(state, **dict(zip(("param", "exp_avg", "exp_avg_sq"), coded.values())))
    expected = Coded.of(plain.clone().run(cpu_isas[0], hyper), moments)
    for backend in cpu_isas:
        assert coded.clone().run(backend, state.grad, hyper).same_bits(expected)


@ways
def test_the_same_bits_on_two_threads(cpu, adam_state, hyper, threads, moments):
    state = adam_state(LONG, torch.float16)
    coded = Coded.of(state, moments)
    threads(1)
    one = coded.clone().run(cpu, state.grad, hyper)
    threads(2)
    assert coded.clone().run(cpu, state.grad, hyper).same_bits(one)


@given(cut=st.integers(0, 30).map(lambda groups: 32 * groups))
@settings(max_examples=15, deadline=None)
def test_parts_of_whole_groups_are_the_whole(cut):
    x = torch.randn(997)
    whole = state_codecs.encode_signed(x)
    parts = [state_codecs.encode_signed(x[:cut]), state_codecs.encode_signed(x[cut:])]
    assert all(torch.equal(torch.cat(pieces), all_) for pieces, all_ in zip(zip(*parts), whole))


@ways
def test_infinite_gradients_do_not_pass_for_numbers(backend, adam_state, hyper, moments):
    state = adam_state(96)
    state.grad[40] = torch.nan
    param = Coded.of(state, moments).run(backend, state.grad, hyper).values()[0]
    assert param[40].isnan()
    assert param[:32].isfinite().all()


def test_scales_must_fit(backend, adam_state, hyper):
    state = adam_state(100)
    coded = Coded.of(state, "int8")
    coded.beside.scales["exp_avg"] = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"scales\['exp_avg'\] must be 4 contiguous values on cpu.*got shape \(3,\)"):
        coded.run(backend, state.grad, hyper)
    with pytest.raises(ValueError, match=r"^exp_avg must be torch.float32 or torch.bfloat16; got torch.int8"):
        dataclasses.replace(coded, beside=Beside(coded.beside.low)).run(backend, state.grad, hyper)
