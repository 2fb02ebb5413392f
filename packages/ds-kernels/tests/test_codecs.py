"""Compressed messages: sizes, layout, round trips, error feedback, the same bytes everywhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ds_kernels import ReferenceBackend
from ds_kernels.codecs import BlockCodec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CODES = ("sign", "ternary", "int4", "int8")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DIGITS = {"sign": 8, "ternary": 5, "int4": 2, "int8": 1}

codecs = st.builds(
    lambda code, block, scale_dtype: {"code": code, "block": 64 * block, "scale_dtype": scale_dtype},
    st.sampled_from(CODES),
    st.integers(1, 16),
    st.sampled_from([torch.float32, torch.float16]),
)
fixtures_do_not_change = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def numbers(numel: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.exp(2 * torch.randn(numel, generator=generator))
    x[::7] = 0
    return x.to(dtype)


@given(settings=codecs, numel=st.integers(0, 3000))
def test_the_size_is_the_documented_one(settings, numel):
    block, digits = settings["block"], DIGITS[settings["code"]]
    lengths = [min(block, numel - at) for at in range(0, numel, block)]
    codec = BlockCodec(**settings)
    scales = len(lengths) * (4 if settings["scale_dtype"] == torch.float32 else 2)
    assert codec.payload_bytes(numel) == scales + sum(math.ceil(length / digits) for length in lengths)
    assert codec.encode(torch.ones(numel)).shape == (codec.payload_bytes(numel),)


def by_hand(codec: BlockCodec, payload, numel: int) -> list[float]:
    """Decode after the text of [Note: Payload], one element at a time."""
    data, digits = bytes(payload.tolist()), DIGITS[codec.code]
    base = {"sign": 2, "ternary": 3, "int4": 16, "int8": 256}[codec.code]
    width = codec.scale_dtype.itemsize
    at, values = -(-numel // codec.block) * width, []
    for index in range(-(-numel // codec.block)):
        length = min(codec.block, numel - index * codec.block)
        scale = torch.frombuffer(bytearray(data[index * width : (index + 1) * width]), dtype=codec.scale_dtype).item()
        m = -(-length // digits)
        for i in range(length):
            digit = data[at + i % m] // base ** (i // m) % base
            if codec.code == "sign":
                value = 2 * digit - 1
            elif codec.code == "ternary":
                value = digit - 1
            else:
                value = digit - base if digit >= base // 2 else digit
            values.append(value * scale)
        at += m
    assert at == len(data)
    return values


@given(settings=codecs, numel=st.integers(0, 1500))
@fixtures_do_not_change
def test_the_layout_is_the_documented_one(backend, settings, numel):
    codec = BlockCodec(**settings, kernels=backend)
    payload = codec.encode(numbers(numel))
    expected = torch.tensor(by_hand(codec, payload, numel), dtype=torch.float32)
    assert torch.equal(codec.decode(payload, torch.empty(numel)), expected)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("code", CODES)
def test_the_same_bytes_everywhere(cpu_isas, threads, code, dtype, scale_dtype):
    numel = 70_001
    x = numbers(numel, dtype)
    settings = {"code": code, "block": 192, "scale_dtype": scale_dtype}
    found = []
    for backend, count in [(ReferenceBackend(), 1), *itertools.product(cpu_isas, (1, 2))]:
        threads(count)
        codec, error = BlockCodec(**settings, kernels=backend), numbers(numel + 1)[1:] * 0.1
        payload = codec.encode(x, error=error)
        total = codec.accumulate(payload, numbers(numel).clone(), scale=0.3)
        found.append((payload, error, codec.decode(payload, torch.empty(numel, dtype=dtype)), total))
    for result in found[1:]:
        assert all(map(torch.equal, result, found[0]))


@given(settings=codecs, numel=st.integers(1, 2000), cut=st.integers(0, 5))
@fixtures_do_not_change
def test_a_part_of_whole_blocks_is_coded_as_in_the_whole(backend, settings, numel, cut):
    codec, x = BlockCodec(**settings, kernels=backend), numbers(numel)
    at = min(cut * codec.block, numel)
    whole = codec.decode(codec.encode(x), torch.empty(numel))
    parts = [codec.decode(codec.encode(part), torch.empty(len(part))) for part in (x[:at], x[at:])]
    assert torch.equal(torch.cat(parts), whole)


@given(settings=codecs, numel=st.integers(0, 1500), steps=st.integers(1, 12))
@fixtures_do_not_change
def test_what_was_sent_and_the_error_are_what_was_meant(backend, settings, numel, steps):
    codec = BlockCodec(**settings, kernels=backend)
    error, sent, meant = torch.zeros(numel), torch.zeros(numel, dtype=torch.float64), 0.0
    size = torch.zeros(numel, dtype=torch.float64)
    for step in range(steps):
        x = numbers(numel).roll(step)
        size += x.abs() + error.abs()
        payload = codec.encode(x, error=error)
        decoded = codec.decode(payload, torch.empty(numel))
        size += decoded.abs()
        meant, sent = meant + x.double(), sent + decoded.double()
    # Each step rounds an addition and a subtraction.
    assert ((sent + error - meant).abs() <= 2 * torch.finfo(torch.float32).eps * size).all()


@given(code=st.sampled_from(CODES), numel=st.integers(1, 900), kept=st.floats(0, 1))
@fixtures_do_not_change
def test_a_message_leaves_less_than_it_carries(backend, code, numel, kept):
    """Error feedback rests on this; with the root mean square as scale, sparse messages would break it."""
    x = numbers(numel) * (torch.rand(numel) < kept)
    error = torch.zeros(numel)
    BlockCodec(code=code, kernels=backend).encode(x, error=error)
    assert error.norm() <= x.norm() * (1 + 1e-6)


@pytest.mark.parametrize("code", CODES)
def test_an_error_of_zeros_changes_no_byte(backend, code):
    codec, x = BlockCodec(code=code, kernels=backend), numbers(777)
    assert torch.equal(codec.encode(x), codec.encode(x, error=torch.zeros(777)))


@pytest.mark.parametrize(("code", "bound"), [("sign", 0.45), ("ternary", 0.25), ("int4", 0.03), ("int8", 2e-4)])
def test_the_loss_of_one_message(backend, code, bound):
    # Of Gaussian numbers, sign leaves 1 - 2/pi = 0.36 of the squares, ternary 0.19.
    x = torch.randn(100_000)
    decoded = BlockCodec(code=code, kernels=backend).encode(x)
    left = x - BlockCodec(code=code, kernels=backend).decode(decoded, torch.empty(100_000))
    assert left.square().sum() <= bound * x.square().sum()


@pytest.mark.parametrize(("code", "levels"), [("int4", 7), ("int8", 127)])
def test_integers_survive_exactly_and_ties_go_to_even(backend, code, levels):
    codec = BlockCodec(code=code, block=64, kernels=backend)
    x = torch.arange(64.0).remainder(2 * levels + 1) - levels
    x[0] = levels
    assert torch.equal(codec.decode(codec.encode(x), torch.empty(64)), x)
    ties = torch.tensor([levels, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert codec.decode(codec.encode(ties), torch.empty(6)).tolist() == [levels, 0, 2, 2, 0, -2]


def test_ternary_has_an_exact_zero_and_zeros_stay(backend):
    codec = BlockCodec(code="ternary", block=64, kernels=backend)
    x = torch.zeros(64)
    x[3], x[9] = 2.0, -2.0
    assert torch.equal(codec.decode(codec.encode(x), torch.full((64,), 5.0)), x)
    for code in CODES:
        other = BlockCodec(code=code, kernels=backend)
        assert other.decode(other.encode(torch.zeros(70)), torch.ones(70)).count_nonzero() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("code", CODES)
def test_what_is_not_finite_is_seen_by_who_decodes(backend, code, bad):
    codec, x = BlockCodec(code=code, block=64, kernels=backend), numbers(200)
    clean = codec.decode(codec.encode(x), torch.empty(200))
    x[70] = bad
    decoded = codec.decode(codec.encode(x), torch.empty(200))
    assert not decoded[70].isfinite()
    assert torch.equal(decoded[:64], clean[:64])
    assert torch.equal(decoded[128:], clean[128:])


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("code", CODES)
def test_extreme_sizes_keep_the_error_finite(backend, code, scale_dtype, size):
    x = torch.linspace(-1, 1, 100) * size
    error = torch.zeros(100)
    codec = BlockCodec(code=code, scale_dtype=scale_dtype, kernels=backend)
    decoded = codec.decode(codec.encode(x, error=error), torch.empty(100))
    assert decoded.isfinite().all()
    assert (decoded + error - x).abs().max() <= 1e-6 * x.abs().max()


def test_payloads_at_odd_addresses(backend):
    x = numbers(300)
    for code in CODES:
        codec = BlockCodec(code=code, kernels=backend)
        payload = torch.zeros(codec.payload_bytes(300) + 1, dtype=torch.uint8)[1:]
        assert torch.equal(codec.encode(x, payload=payload), codec.encode(x))
        assert torch.equal(codec.decode(payload, torch.empty(300)), codec.decode(payload.clone(), torch.empty(300)))


def test_what_does_not_fit_is_named(backend):
    codec, x = BlockCodec(code="int4", kernels=backend), torch.ones(100)
    payload = codec.encode(x)
    with pytest.raises(ValueError, match="code must be one of sign, ternary, int4, int8; got 'int2'"):
        BlockCodec(code="int2")
    with pytest.raises(ValueError, match=r"block must be a multiple of 64 in 64 \.\.\. 1024; got 100"):
        BlockCodec(code="int8", block=100)
    with pytest.raises(ValueError, match=r"scale_dtype must be torch.float32 or torch.float16; got torch.bfloat16"):
        BlockCodec(code="int8", scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="payload of 100 elements must have 54 bytes and lie on cpu; got 53"):
        codec.encode(x, payload=payload[:53])
    with pytest.raises(ValueError, match="payload of 101 elements must have 55 bytes"):
        codec.decode(payload, torch.ones(101))
    with pytest.raises(ValueError, match=r"x must be dense, contiguous and .*strides \(2,\)"):
        codec.encode(torch.ones(200)[::2])
    with pytest.raises(ValueError, match="error must have as many elements as x, 100, and lie on cpu; got 99"):
        codec.encode(x, error=torch.zeros(99))
    with pytest.raises(ValueError, match=r"out must be dense, contiguous and torch.float32; got .*torch.bfloat16"):
        codec.accumulate(payload, torch.ones(100, dtype=torch.bfloat16))


def test_writes_are_seen_by_autograd(backend):
    codec, weight = BlockCodec(code="int8", kernels=backend), torch.ones(70, requires_grad=True)
    out = torch.ones(70)
    product = (weight * out).sum()
    codec.decode(codec.encode(torch.zeros(70)), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
