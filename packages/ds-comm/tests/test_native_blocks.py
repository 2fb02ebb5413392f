"""Block codes in C++: the bits of the torch operations."""

from __future__ import annotations

import pytest
import torch
from ds_comm.codecs import BlockCodec
from ds_comm.codecs.native import NativeBlocks, native_codes
from ds_comm.codecs.plain import PlainCodec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .codec_table import CODES, numbers

MODULE = native_codes(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MODULE is None, reason="needs the native module")

codecs = st.builds(
    lambda code, block, scale_dtype: BlockCodec(code=code, block=64 * block, scale_dtype=scale_dtype),
    st.sampled_from(CODES),
    st.integers(1, 16),
    st.sampled_from([torch.float32, torch.float16]),
)


def check(codec: BlockCodec, x: Tensor, error: Tensor | None, *, best: bool) -> None:
    """Compare encoding, decoding and addition with those in torch; what is no number counts as equal."""
    native, numel, layout = NativeBlocks(MODULE, best=best), x.numel(), codec._layout
    payloads = torch.zeros(2, codec.payload_bytes(numel), dtype=torch.uint8)
    errors = [None if error is None else error.clone() for _ in range(2)]
    PlainCodec._encode(codec, x, errors[0], payloads[0])
    native.block_encode(x, errors[1], payloads[1], layout)
    scale_bytes = layout.scale_bytes(numel)
    scales = [payload[:scale_bytes].clone().view(codec.scale_dtype) for payload in payloads]
    assert same(*scales)
    assert torch.equal(payloads[0, scale_bytes:], payloads[1, scale_bytes:])
    if error is not None:
        assert same(errors[0], errors[1])
    outs = numbers(numel, seed=2).expand(2, numel).clone()
    PlainCodec._accumulate(codec, payloads[0], outs[0], 0.3)
    native.block_accumulate(outs[1], payloads[0], layout, 0.3)
    assert same(outs[0], outs[1])
    PlainCodec._decode(codec, payloads[0], outs[0])
    native.block_decode(outs[1], payloads[0], layout)
    assert same(outs[0], outs[1])


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@given(
    codec=codecs,
    numel=st.integers(0, 2100),
    kept=st.floats(0, 1),
    size=st.sampled_from([1e-44, 1e-39, 1e-7, 1.0, 1e6, 1e30]),
    rounded=st.booleans(),
    owed=st.booleans(),
    best=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_bits_of_torch(
    codec: BlockCodec, numel: int, kept: float, size: float, rounded: bool, owed: bool, best: bool
) -> None:
    x = numbers(numel) * (torch.rand(numel) < kept) * size
    check(codec, x.round() if rounded else x, numbers(numel, seed=1) * size if owed else None, best=best)


@given(
    codec=codecs,
    numel=st.integers(1, 700),
    wrong=st.lists(st.sampled_from([torch.inf, -torch.inf, torch.nan, 3e38]), min_size=1, max_size=3),
    best=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_not_finite(codec: BlockCodec, numel: int, wrong: list[float], best: bool) -> None:
    x = numbers(numel)
    for at, value in enumerate(wrong):
        x[(at * 97) % numel] = value
    check(codec, x, None, best=best)
    check(codec, x, numbers(numel, seed=1), best=best)


@pytest.mark.parametrize("code", CODES)
def test_every_float16_scale(code: str) -> None:
    """All halves, and what lies in the middle between two."""
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    middle = (halves[1:] + halves[:-1]) / 2
    scales = torch.cat((halves, middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(torch.inf))))
    levels = {"sign": 1.0, "ternary": 1.0, "int4": 7.0, "int8": 127.0}[code]
    x = (scales * levels).unsqueeze(1).expand(-1, 64).reshape(-1)
    check(BlockCodec(code=code, block=64, scale_dtype=torch.float16), x, None, best=True)


def test_payloads_need_no_alignment() -> None:
    codec, x = BlockCodec(code="int4", block=64), numbers(333)
    expected = codec.encode(x)
    memory = torch.zeros(1 + len(expected), dtype=torch.uint8)
    assert torch.equal(codec.encode(x, payload=memory[1:]), expected)
    assert torch.equal(codec.decode(memory[1:], torch.empty(333)), codec.decode(expected, torch.empty(333)))


def test_a_name_without_code_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no native code int3"):
        MODULE.block_decode(True, 0, 0, 0, 64, "int3", False)


def test_the_version_of_what_is_written_counts() -> None:
    codec, error, out = BlockCodec(code="sign"), torch.zeros(64), torch.zeros(64)
    payload = codec.encode(torch.ones(64), error=error)
    codec.accumulate(codec.encode(torch.ones(64), payload=payload), codec.decode(payload, out))
    assert (error._version, payload._version > 0, out._version) == (1, True, 2)
