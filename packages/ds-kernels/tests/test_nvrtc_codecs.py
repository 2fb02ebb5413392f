"""The codecs' GPU sources, run on the CPU: the bytes and errors of plain torch, any length, address and block."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ds_kernels import ReferenceBackend
from ds_kernels.backends.payload import DIGITS, Layout

PLAIN = ReferenceBackend()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (torch.float32, torch.float16)
LENGTHS = (0, 1, 63, 65, 192, 900, 4097)
codes = pytest.mark.parametrize("code", DIGITS)


def numbers(numel, dtype=torch.float32):
    x = torch.randn(numel) * torch.exp(2 * torch.randn(numel))
    x[::7] = 0
    return x.to(dtype)


def encoded(backend, x, error, layout, offset=0):
    """Bytes and error of a payload that starts ``offset`` bytes into memory that is not its own."""
    size = layout.payload_bytes(x.numel())
    memory = torch.full((offset + size + 8,), 77, dtype=torch.uint8)
    error = None if error is None else error.clone()
    backend.find("block_encode", x.device, x.dtype)(x, error, memory[offset : offset + size], layout)
    assert (memory[:offset] == 77).all()
    assert (memory[offset + size :] == 77).all()
    return memory[offset : offset + size], error


def same(got, want):
    """Equal in every bit, but for the bits of NaNs."""
    if got is None or want is None or not got.is_floating_point():
        return (got is None and want is None) or torch.equal(got, want)
    bits = {4: torch.int32, 2: torch.int16}[got.itemsize]
    return bool(((got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())).all())


@codes
@pytest.mark.parametrize("block", [64, 192, 256, 1024])
def test_bytes_errors_and_numbers_are_those_of_plain_torch(on_host, code, block):
    layout = Layout(code, block, torch.float32 if block <= 256 else torch.float16)
    for numel, with_error, offset in product(LENGTHS, (True, False), (0, 3)):
        x, error = numbers(numel + 1)[1:] if offset else numbers(numel), numbers(numel) if with_error else None
        payload, left = encoded(on_host, x, error, layout, offset)
        want, want_left = encoded(PLAIN, x, error, layout)
        assert torch.equal(payload, want)
        assert same(left, want_left)
        _compare_decoders(on_host, payload, layout, numel, torch.float32)


@codes
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_half_formats_are_read_and_written(on_host, code, dtype):
    layout = Layout(code, 128, torch.float32)
    for offset in (0, 1):  # packets of 8 bytes, and not
        x, error = numbers(700, dtype)[offset:], numbers(700)[offset:]
        payload, left = encoded(on_host, x, error, layout)
        want, want_left = encoded(PLAIN, x, error, layout)
        assert torch.equal(payload, want)
        assert same(left, want_left)
        _compare_decoders(on_host, payload, layout, x.numel(), dtype)


def _compare_decoders(backend, payload, layout, numel, dtype):
    results = []
    for one in (backend, PLAIN):
        out, total = torch.full((numel + 4,), 7.0, dtype=dtype), torch.linspace(-1, 1, numel)
        one.find("block_decode", out.device, dtype)(out[:numel], payload, layout)
        one.find("block_accumulate", out.device, torch.float32)(total, payload, layout, 1 / 3)
        assert (out[numel:] == 7.0).all()
        results.append((out, total))
    assert all(map(same, *results))


@codes
@pytest.mark.parametrize("scale", SCALES)
def test_special_values_have_the_bytes_of_plain_torch(on_host, code, scale):
    layout = Layout(code, 64 if scale == torch.float32 else 512, scale)
    largest = torch.finfo(torch.float32).max
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, 1e-39, 1e-37, 7e4, 1e30, largest, -0.0):
        x, error = numbers(200) * (0 if abs(value) < 1e-30 else 1), torch.zeros(200)
        x[[5, 70, 199]] = value
        payload, left = encoded(on_host, x, error, layout)
        want, want_left = encoded(PLAIN, x, error, layout)
        assert same(left, want_left), value
        kept = torch.empty(2, 200)
        for out, bytes_of in zip(kept, (payload, want)):
            PLAIN.find("block_decode", out.device, out.dtype)(out, bytes_of, layout)
        assert same(kept[0], kept[1]), value
        at = layout.scale_bytes(200)
        assert torch.equal(payload[at:], want[at:]), value  # scales that are NaN may differ in bits


def test_what_does_not_lie_on_the_device_is_named(on_host):
    layout = Layout("int8", 64, torch.float32)
    x = torch.empty(64, device="meta")
    payload = torch.empty(layout.payload_bytes(64), dtype=torch.uint8, device="meta")
    for run in (
        lambda: on_host.block_encode(x, None, payload, layout),
        lambda: on_host.block_decode(x, payload, layout),
        lambda: on_host.block_accumulate(x, payload, layout, 1.0),
    ):
        with pytest.raises(ValueError, match=r"'nvrtc' works on tensors in host memory; got (x|out) on meta"):
            run()
