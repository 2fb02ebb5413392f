"""The codes of blocks: their layout, what they lose, what they keep exactly."""

from __future__ import annotations

import math

import pytest
import torch
from ds_comm.codecs import BlockCodec, contraction
from hypothesis import given, settings
from hypothesis import strategies as st

from .codec_table import CODES, numbers

DIGITS = {"sign": 8, "ternary": 5, "int4": 2, "int8": 1}
BASE = {"sign": 2, "ternary": 3, "int4": 16, "int8": 256}

codecs = st.builds(
    lambda code, block, scale_dtype: BlockCodec(code=code, block=64 * block, scale_dtype=scale_dtype),
    st.sampled_from(CODES),
    st.integers(1, 16),
    st.sampled_from([torch.float32, torch.float16]),
)


def by_hand(codec: BlockCodec, payload, numel: int) -> list[float]:
    """Decode after the text of [Note: Block payload], one element at a time."""
    data, digits, base = bytes(payload.tolist()), DIGITS[codec.code], BASE[codec.code]
    width = codec.scale_dtype.itemsize
    at, values = -(-numel // codec.block) * width, []
    for index in range(-(-numel // codec.block)):
        length = min(codec.block, numel - index * codec.block)
        scale = torch.frombuffer(bytearray(data[index * width : (index + 1) * width]), dtype=codec.scale_dtype).item()
        m = math.ceil(length / digits)
        for element in range(length):
            digit = data[at + element % m] // base ** (element // m) % base
            signed = digit - base if digit >= base // 2 else digit
            values.append({"sign": 2 * digit - 1, "ternary": digit - 1}.get(codec.code, signed) * scale)
        at += m
    assert at == len(data)
    return values


@given(codec=codecs, numel=st.integers(0, 1500))
@settings(max_examples=40, deadline=None)
def test_the_layout_is_the_documented_one(codec, numel):
    payload = codec.encode(numbers(numel))
    expected = torch.tensor(by_hand(codec, payload, numel), dtype=torch.float32)
    assert torch.equal(codec.decode(payload, torch.empty(numel)), expected)


def scale_of(codec: BlockCodec, x) -> float:
    x = x.double()
    size = x.abs()
    if codec.code == "sign":
        return float(x.square().mean().sqrt() if codec.scale == "rms" else size.mean())
    if codec.code == "ternary":
        return float(size[size > 0.7 * size.mean()].mean())
    return float(size.max() / (7 if codec.code == "int4" else 127))


@pytest.mark.parametrize("numel", [1024, 1000])
@pytest.mark.parametrize("codec", [*(BlockCodec(code=code) for code in CODES), BlockCodec(code="sign", scale="rms")])
def test_scales_are_those_of_float64_to_rounding(codec, numel):
    x = numbers(numel)
    scales = codec.encode(x)[:16].view(torch.float32)
    expected = [scale_of(codec, block) for block in x.split(256)]
    # in the order of a tree below 64 lanes of 4: 10 roundings of sums, 3 of the rest
    assert torch.allclose(scales.double(), torch.tensor(expected).double(), rtol=13 * 2**-24, atol=0)


def samples(kind: str):
    numel = 1 << 20
    if kind == "gauss":
        return torch.randn(numel)
    if kind == "laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample((numel,))
    if kind == "student":
        return torch.distributions.StudentT(2.5).sample((numel,))
    return torch.randn(numel) * (torch.rand(numel) < 0.1)


@pytest.mark.parametrize(
    ("kind", "rms", "mean", "int4", "tolerance"),
    [
        ("gauss", 0.404, 0.364, 0.016, 0.03),
        ("laplace", 0.586, 0.500, 0.032, 0.03),
        # of 2.5 degrees of freedom the squares have no finite variance: another sample, another factor
        ("student", 0.856, 0.673, 0.088, 0.25),
        ("sparse", 1.495, 0.936, 0.009, 0.25),
    ],
)
def test_contraction_factors_are_the_known_ones(kind, rms, mean, int4, tolerance):
    x = samples(kind)
    assert contraction(x, BlockCodec(code="sign", block=1024, scale="rms")) == pytest.approx(rms, rel=tolerance)
    assert contraction(x, BlockCodec(code="sign", block=1024)) == pytest.approx(mean, rel=tolerance)
    assert contraction(x, BlockCodec(code="int4", block=256)) == pytest.approx(int4, rel=tolerance)
    assert contraction(x, BlockCodec(code="int8")) < 1e-3


@given(code=st.sampled_from(CODES), numel=st.integers(1, 900), kept=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_message_leaves_less_than_it_carries(code, numel, kept):
    """Error feedback rests on this; with the root mean square as scale, sparse messages would break it."""
    x = numbers(numel) * (torch.rand(numel) < kept)
    assert contraction(x, BlockCodec(code=code)) <= 1 + 1e-6


def test_with_the_root_mean_square_sparse_messages_leave_more_than_they_carry():
    assert contraction(samples("sparse"), BlockCodec(code="sign", scale="rms")) > 1.2


@pytest.mark.parametrize(("code", "levels"), [("int4", 7), ("int8", 127)])
def test_integers_survive_exactly_and_ties_go_to_even(code, levels):
    codec = BlockCodec(code=code, block=64)
    x = torch.arange(64.0).remainder(2 * levels + 1) - levels
    x[0] = levels
    assert torch.equal(codec.decode(codec.encode(x), torch.empty(64)), x)
    ties = torch.tensor([levels, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert codec.decode(codec.encode(ties), torch.empty(6)).tolist() == [levels, 0, 2, 2, 0, -2]


def test_ternary_has_an_exact_zero():
    codec = BlockCodec(code="ternary", block=64)
    x = torch.zeros(64)
    x[3], x[9] = 2.0, -2.0
    assert torch.equal(codec.decode(codec.encode(x), torch.full((64,), 5.0)), x)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="code must be one of sign, ternary, int4, int8; got 'int2'"):
        BlockCodec(code="int2")
    with pytest.raises(ValueError, match=r"block must be a multiple of 64 in 64 \.\.\. 1024; got 100"):
        BlockCodec(code="int8", block=100)
    with pytest.raises(ValueError, match=r"scale_dtype must be torch.float32 or torch.float16; got torch.bfloat16"):
        BlockCodec(code="int8", scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="scale must be 'mean' or 'rms'; got 'max'"):
        BlockCodec(code="sign", scale="max")


def test_writes_are_seen_by_autograd():
    codec, weight = BlockCodec(code="int8"), torch.ones(70, requires_grad=True)
    out = torch.ones(70)
    product = (weight * out).sum()
    codec.decode(codec.encode(torch.zeros(70)), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
