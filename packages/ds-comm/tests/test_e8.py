"""The E8 code: its vectors, that the nearest is sent, exact zeros, native code with the bits of torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ds_comm.codecs import BlockCodec, E8Codec, contraction
from ds_comm.codecs.e8 import _vectors
from ds_comm.codecs.native import native_codes
from ds_comm.codecs.plain import PlainCodec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .codec_table import numbers

CPU = torch.device("cpu")


def by_the_text(byte: int) -> list[float]:
    """The vector of a byte after the table of [Note: E8 payload]."""
    vector = [0.0] * 8
    if byte < 127:
        vector = [-0.5 if byte >> i & 1 else 0.5 for i in range(7)]
        negatives = sum(each < 0 for each in vector)
        return [*vector, -0.5 if negatives % 2 else 0.5]
    if 128 <= byte < 240:
        pairs = [(p, q) for q in range(8) for p in range(q)]
        p, q = pairs[(byte - 128) // 4]
        vector[q], vector[p] = (-1.0 if byte & 2 else 1.0), (-1.0 if byte & 1 else 1.0)
    if byte >= 240:
        vector[(byte - 240) // 2] = -1.0 if byte & 1 else 1.0
    return vector


def test_bytes_stand_for_the_documented_vectors_of_the_lattice() -> None:
    expected = torch.tensor([by_the_text(byte) for byte in range(256)])
    assert torch.equal(_vectors(CPU).t(), expected)
    assert len(set(map(tuple, expected.tolist()))) == 256
    shortest = [vector for vector in expected if vector.square().sum() == 2]
    assert len(shortest) == 239  # of the 240 of E8
    for vector in shortest:
        doubled = (2 * vector).int()
        assert len({int(each) % 2 for each in doubled}) == 1  # all integers, or all halves of odd numbers
        assert int(doubled.sum()) % 4 == 0  # whose sum is even


def groups(x: Tensor, block: int) -> Tensor:
    """Float64 ``[n, 8]``: the elements of each byte, in the order of bytes."""
    found = []
    for part in x.split(block):
        m = math.ceil(len(part) / 8)
        padded = torch.cat((part, part.new_zeros(8 * m - len(part))))
        found.append(padded.view(8, m).t())
    return torch.cat(found).double()


@given(numel=st.integers(1, 1100), kept=st.floats(0, 1), block=st.sampled_from([64, 192, 512, 1024]))
@settings(max_examples=40, deadline=None)
def test_the_nearest_vector_is_sent(numel: int, kept: float, block: int) -> None:
    x = numbers(numel) * (torch.rand(numel) < kept)
    codec = E8Codec(block=block)
    payload = codec.encode(x)
    num_blocks = math.ceil(numel / block)
    scales = payload[: 4 * num_blocks].clone().view(torch.float32).double()
    lengths = torch.tensor([math.ceil(len(part) / 8) for part in x.split(block)])
    codes, scale = payload[4 * num_blocks :].long(), scales.repeat_interleave(lengths).view(-1, 1, 1)
    table, meant = _vectors(CPU).t().double(), groups(x, block)
    allowed = ~((meant == 0).unsqueeze(1) & (table != 0)).any(2)  # what is zero stays zero
    distances = (meant.unsqueeze(1) - scale * table).square().sum(2)
    sent = distances.gather(1, codes.unsqueeze(1)).squeeze(1)
    assert bool(allowed.gather(1, codes.unsqueeze(1)).all())
    best = distances.where(allowed, torch.inf).amin(1)
    # magnitudes are compared without their last three bits
    tolerance = 1e-5 * (meant.square().sum(1) + scale.view(-1).square())
    assert bool((sent <= best + tolerance).all())


@pytest.mark.parametrize(("kind", "least"), [("gauss", 0.04), ("laplace", 0.1), ("student", 0.05), ("sparse", 0.5)])
def test_it_loses_less_than_the_sign_in_as_many_bytes(kind: str, least: float) -> None:
    x = {
        "gauss": lambda: torch.randn(1 << 18),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((1 << 18,)),
        "student": lambda: torch.distributions.StudentT(2.5).sample((1 << 18,)),
        "sparse": lambda: torch.randn(1 << 18) * (torch.rand(1 << 18) < 0.1),
    }[kind]()
    sign, e8 = BlockCodec(code="sign", block=512), E8Codec()
    assert e8.payload_bytes(1 << 18) == sign.payload_bytes(1 << 18)
    assert contraction(x, e8) < contraction(x, sign) - least


def test_what_is_zero_stays_zero_and_what_stands_alone_is_sent() -> None:
    x = torch.zeros(512)
    x[[5, 77, 300]] = torch.tensor([2.0, -2.0, 2.0])
    assert torch.equal(E8Codec().decode(E8Codec().encode(x), torch.ones(512)), x)
    x = numbers(4096) * (torch.rand(4096) < 0.8)
    decoded = E8Codec().decode(E8Codec().encode(x), torch.ones(4096))
    assert not decoded[x == 0].any()
    assert bool((decoded * x >= 0).float().mean() > 0.95)  # only the smallest of a group takes the other sign


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64, 4096])
def test_both_hops_take_less_than_the_bits_of_a_sign_would_allow(ranks: int) -> None:
    numel = ranks * 512 * 100
    assert 2 * (ranks - 1) * E8Codec().payload_bytes(numel // ranks) / numel <= 0.27


@pytest.mark.skipif(native_codes(CPU) is None, reason="needs the native module")
@given(
    numel=st.integers(0, 2100),
    block=st.integers(1, 16),
    kept=st.floats(0, 1),
    size=st.sampled_from([1e-44, 1e-39, 1.0, 1e30]),
    rounded=st.booleans(),
    best=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_native_code_has_the_bits_of_torch(
    numel: int, block: int, kept: float, size: float, rounded: bool, best: bool
) -> None:
    codec, native, table = E8Codec(block=64 * block), native_codes(CPU), _vectors(CPU).data_ptr()
    x = numbers(numel) * (torch.rand(numel) < kept) * size
    x, errors = (x.round() if rounded else x), (numbers(numel, seed=1) * size).expand(2, numel).clone()
    payloads = torch.zeros(2, codec.payload_bytes(numel), dtype=torch.uint8)
    PlainCodec._encode(codec, x, errors[0], payloads[0])
    common: tuple[Any, ...] = (numel, codec.block, table)
    native.e8_encode(best, x.data_ptr(), errors[1].data_ptr(), payloads[1].data_ptr(), *common)
    assert torch.equal(payloads[0], payloads[1])
    assert torch.equal(errors[0], errors[1])
    outs = numbers(numel, seed=2).expand(2, numel).clone()
    PlainCodec._accumulate(codec, payloads[0], outs[0], 0.3)
    native.e8_accumulate(best, outs[1].data_ptr(), payloads[1].data_ptr(), *common, 0.3)
    assert torch.equal(outs[0], outs[1])
    PlainCodec._decode(codec, payloads[0], outs[0])
    native.e8_decode(best, outs[1].data_ptr(), payloads[1].data_ptr(), *common)
    assert torch.equal(outs[0], outs[1])


def test_blocks_are_coded_in_parts_of_any_number() -> None:
    x = numbers(3 * (1 << 17) + 700)
    whole, error = torch.empty(E8Codec().payload_bytes(len(x)), dtype=torch.uint8), torch.zeros(len(x))
    PlainCodec._encode(E8Codec(), x, error, whole)
    decoded = E8Codec().decode(whole, torch.empty(len(x)))
    parts = [E8Codec().decode(E8Codec().encode(part), torch.empty(len(part))) for part in x.split(512)]
    assert torch.equal(torch.cat(parts), decoded)
    assert torch.allclose(decoded + error, x)


@pytest.mark.parametrize("block", [0, 100, 2048])
def test_blocks_out_of_range_are_named(block: int) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 64 in 64 \.\.\. 1024; got {block}"):
        E8Codec(block=block)
