"""What holds for every codec: sizes, error feedback, parts of a whole, odd memory, what is not finite."""

from __future__ import annotations

import pytest
import torch
from ds_comm.codecs import contraction
from hypothesis import given, settings
from hypothesis import strategies as st

from .codec_table import CODECS, FLOATS, numbers

codecs = st.sampled_from(list(CODECS.values()))
numels = st.integers(0, 1500)
quick = settings(max_examples=60, deadline=None)


@given(codec=codecs, numel=numels, dtype=st.sampled_from(FLOATS))
@quick
def test_the_size_is_known_before(codec, numel, dtype):
    payload = codec.encode(numbers(numel, dtype))
    assert payload.dtype == torch.uint8
    assert payload.shape == (codec.payload_bytes(numel),)


@given(codec=codecs, numel=numels, steps=st.integers(1, 8))
@quick
def test_what_was_sent_and_the_error_are_what_was_meant(codec, numel, steps):
    error, sent, meant = torch.zeros(numel), torch.zeros(numel, dtype=torch.float64), 0.0
    size = torch.zeros(numel, dtype=torch.float64)
    for step in range(steps):
        x = numbers(numel, seed=step)
        size += x.abs() + error.abs()
        decoded = codec.decode(codec.encode(x, error=error), torch.empty(numel))
        size += decoded.abs()
        meant, sent = meant + x.double(), sent + decoded.double()
    # each step rounds an addition and a subtraction
    assert ((sent + error - meant).abs() <= 2 * torch.finfo(torch.float32).eps * size).all()


@given(codec=codecs, numel=st.integers(1, 3000), cut=st.integers(0, 5))
@quick
def test_a_part_of_whole_blocks_is_coded_as_in_the_whole(codec, numel, cut):
    x = numbers(numel)
    at = min(cut * codec.block, numel)
    whole = codec.decode(codec.encode(x), torch.empty(numel))
    parts = [codec.decode(codec.encode(part), torch.empty(len(part))) for part in (x[:at], x[at:])]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_same_bytes_on_any_number_of_threads_and_again(codec):
    before = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        error = numbers(70_001, seed=1)
        found.append((codec.encode(numbers(70_001), error=error), error))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_accumulating_is_decoding_and_adding(codec):
    x, total = numbers(1000), numbers(1000, seed=1)
    decoded = codec.decode(codec.encode(x), torch.empty(1000))
    expected = total.double() + 0.25 * decoded.double()
    size = total.abs() + decoded.abs()
    found = codec.accumulate(codec.encode(x), total, scale=0.25)
    assert found is total
    assert ((found - expected).abs() <= 2 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_decoded_in_less_precision_is_rounded(codec, dtype):
    payload = codec.encode(numbers(500))
    wide = codec.decode(payload, torch.empty(500))
    assert torch.equal(codec.decode(payload, torch.empty(500, dtype=dtype)), wide.to(dtype))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_zeros_and_an_error_of_zeros(codec):
    assert codec.decode(codec.encode(torch.zeros(300)), torch.ones(300)).count_nonzero() == 0
    x = numbers(777)
    assert torch.equal(codec.encode(x), codec.encode(x, error=torch.zeros(777)))
    assert contraction(torch.zeros(100), codec) == 0.0


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_odd_addresses_and_shapes(codec):
    x = numbers(301)[1:]
    payload = torch.zeros(codec.payload_bytes(300) + 1, dtype=torch.uint8)[1:]
    assert codec.encode(x.view(3, 100), payload=payload) is payload
    assert torch.equal(payload, codec.encode(x.clone()))
    assert torch.equal(codec.decode(payload, torch.empty(3, 100)).view(-1), codec.decode(payload, torch.empty(300)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_is_not_finite_is_seen_by_who_decodes(codec, bad):
    x = numbers(3 * codec.block)
    clean = codec.decode(codec.encode(x), torch.empty(len(x)))
    at = codec.block + min(6, codec.block - 1)
    x[at] = bad
    decoded = codec.decode(codec.encode(x), torch.empty(len(x)))
    assert not decoded[at].isfinite()
    others = [slice(0, codec.block), slice(2 * codec.block, None)]
    assert all(torch.equal(decoded[other], clean[other]) for other in others)


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_extreme_sizes_keep_the_error_finite(codec, size):
    x = torch.linspace(-1, 1, 100) * size
    error = torch.zeros(100)
    decoded = codec.decode(codec.encode(x, error=error), torch.empty(100))
    assert decoded.isfinite().all()
    assert (decoded + error - x).abs().max() <= 1e-6 * x.abs().max()


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_does_not_fit_is_named(codec):
    x = torch.ones(100)
    payload = codec.encode(x)
    with pytest.raises(ValueError, match=f"100 elements on cpu have a payload of {len(payload)} bytes there; got 3"):
        codec.encode(x, payload=payload[:3])
    with pytest.raises(ValueError, match="2000 elements on cpu have a payload"):
        codec.decode(payload, torch.ones(2000))
    with pytest.raises(ValueError, match="x must be dense and contiguous"):
        codec.encode(torch.ones(200)[::2])
    with pytest.raises(ValueError, match=r"x must be torch.float32 or .*; got torch.int64"):
        codec.encode(torch.ones(200, dtype=torch.int64))
    with pytest.raises(ValueError, match="error must be on cpu and have 100 elements, as x; got 99"):
        codec.encode(x, error=torch.zeros(99))
    with pytest.raises(ValueError, match=r"out must be torch.float32; got torch.bfloat16"):
        codec.accumulate(payload, torch.ones(100, dtype=torch.bfloat16))


def test_codecs_that_code_otherwise_say_so():
    assert len({codec.meaning for codec in CODECS.values()}) == len(CODECS)
