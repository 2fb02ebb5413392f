"""Block codes in plain torch: what they mean, to the bit. See [Note: Payload]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..payload import DIGITS, Layout, check_decode, check_encode

_BASE: Mapping[str, int] = MappingProxyType({"sign": 2, "ternary": 3, "int4": 16, "int8": 256})
_DIGIT_OF_ZERO: Mapping[str, int] = MappingProxyType({"sign": 1, "ternary": 1, "int4": 0, "int8": 0})
_LEVELS: Mapping[str, float] = MappingProxyType({"int4": 7.0, "int8": 127.0})
_LANES = 64


class _Fit(NamedTuple):
    scale: Tensor  # [blocks, 1]
    threshold: Tensor  # [blocks, 1]


@torch.no_grad()
def block_encode(x: Tensor, error: Tensor | None, payload: Tensor, layout: Layout) -> None:
    """Code ``x + error`` into ``payload``; ``error`` becomes what the payload lacks.

    Args:
        x: Float32, bfloat16 or float16.
        error: Float32, as many elements; None: what is lost is lost.
        payload: Bytes, ``layout.payload_bytes(x.numel())``.
        layout: Code, block and type of the scales.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    check_encode(x, error, payload, layout)
    values = x.view(-1).to(torch.float32)
    if error is not None:
        values = values + error.view(-1)
    rows = _blocks(values, layout)
    fit = _fit(rows, values.numel(), layout)
    scales = _saturated(fit.scale, layout.scale_dtype)
    fit = fit._replace(scale=scales.to(torch.float32))
    digits = _digits(rows, fit, layout.code)
    at = layout.scale_bytes(values.numel())
    payload[:at].copy_(scales.view(-1).view(torch.uint8))
    for codes, group in _groups(payload[at:], digits, layout, values.numel()):
        _pack(codes, group, layout.code)
    if error is not None:
        rest = rows - fit.scale * _values(digits, layout.code)
        error.view(-1).copy_(rest.view(-1)[: values.numel()])


@torch.no_grad()
def block_decode(out: Tensor, payload: Tensor, layout: Layout) -> None:
    """Write what ``payload`` stands for into ``out``: float32, bfloat16 or float16.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    check_decode(out, payload, layout)
    out.view(-1).copy_(_decoded(payload, out.numel(), layout, 1.0))


@torch.no_grad()
def block_accumulate(out: Tensor, payload: Tensor, layout: Layout, weight: float) -> None:
    """Add ``weight`` times what ``payload`` stands for to ``out``, float32; the weight goes to the scales first.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    check_decode(out, payload, layout, (torch.float32,))
    out.view(-1).add_(_decoded(payload, out.numel(), layout, weight))


def _decoded(payload: Tensor, numel: int, layout: Layout, weight: float) -> Tensor:
    at = layout.scale_bytes(numel)
    # Cloned: a payload in the middle of a message need not be aligned for floats.
    scales = payload[:at].clone().view(layout.scale_dtype).to(torch.float32) * weight
    digits = torch.zeros(len(scales), layout.block, dtype=torch.int32, device=payload.device)
    for codes, group in _groups(payload[at:], digits, layout, numel):
        _unpack(codes, group, layout.code)
    return (scales.unsqueeze(1) * _values(digits, layout.code)).view(-1)[:numel]


def _blocks(values: Tensor, layout: Layout) -> Tensor:
    """Return ``[blocks, block]``, zeros behind the end."""
    blocks = -(-values.numel() // layout.block)
    rows = values.new_zeros(blocks, layout.block)
    rows.view(-1)[: values.numel()] = values
    return rows


# Digits #


def _fit(rows: Tensor, numel: int, layout: Layout) -> _Fit:
    size = rows.abs()
    nothing = rows.new_zeros(len(rows), 1)
    if layout.code in _LEVELS:
        largest = size.amax(1, keepdim=True) if len(rows) else nothing
        return _Fit(largest / _LEVELS[layout.code], nothing)
    counts = rows.new_full((len(rows), 1), layout.block)
    counts[-1:] = numel - (len(rows) - 1) * layout.block
    mean = _sum(size) / counts
    if layout.code == "sign":
        return _Fit(mean, nothing)
    threshold = mean * 0.7
    large = size > threshold
    kept = _sum(large.to(torch.float32))
    # Nothing is kept of zeros, and of NaN and infinity, which the mean passes on.
    return _Fit(torch.where(kept > 0, _sum(size.where(large, 0)) / kept, mean), threshold)


def _sum(rows: Tensor) -> Tensor:
    """Add up each row in lanes, which then meet 32, 16, ..., 1 apart."""
    first, *others = rows.split(_LANES, dim=1)
    sums: Tensor = first.clone()
    for other in others:
        sums += other
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums


def _saturated(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        scale = scale.masked_fill((scale > largest) & (scale < torch.inf), largest)
    return scale.to(dtype)


def _digits(rows: Tensor, fit: _Fit, code: str) -> Tensor:
    """Return each element's digit, int32, negative ones in two's complement."""
    if code == "sign":
        return (rows >= 0).int()
    if code == "ternary":
        signs: Tensor = (rows > fit.threshold).int() - (rows < -fit.threshold).int()
        return signs + 1
    levels = _LEVELS[code]
    inverse = torch.where(fit.scale >= torch.finfo(torch.float32).tiny, 1.0 / fit.scale, 0.0)
    scaled = rows * inverse
    scaled = scaled.where(scaled < levels, levels)  # also NaN
    return scaled.clamp(min=-levels).round().int() & (_BASE[code] - 1)


def _values(digits: Tensor, code: str) -> Tensor:
    if code == "sign":
        return (2 * digits - 1).float()
    if code == "ternary":
        return (digits - 1).float()
    sign = _BASE[code] // 2
    signed: Tensor = (digits ^ sign) - sign
    return signed.float()


# Bytes #


def _groups(codes: Tensor, digits: Tensor, layout: Layout, numel: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair views of bytes ``[blocks, m]`` and digits ``[blocks, elements]``: of the whole blocks, then of the last."""
    whole, rest = divmod(numel, layout.block)
    at = whole * layout.code_bytes(layout.block)
    yield codes[:at].view(whole, layout.code_bytes(layout.block)), digits[:whole]
    if rest:
        yield codes[at:].unsqueeze(0), digits[whole:, :rest]


def _pack(codes: Tensor, digits: Tensor, code: str) -> None:
    num_digits, bytes_per_block = DIGITS[code], codes.shape[1]
    padded = digits.new_full((len(digits), num_digits * bytes_per_block), _DIGIT_OF_ZERO[code])
    padded[:, : digits.shape[1]] = digits
    codes.copy_((padded.view(-1, num_digits, bytes_per_block) * _powers(digits, code)).sum(1))


def _unpack(codes: Tensor, digits: Tensor, code: str) -> None:
    spread = codes.int().unsqueeze(1) // _powers(digits, code) % _BASE[code]
    digits.copy_(spread.flatten(1)[:, : digits.shape[1]])


def _powers(digits: Tensor, code: str) -> Tensor:
    powers = [_BASE[code] ** i for i in range(DIGITS[code])]
    return torch.tensor(powers, dtype=digits.dtype, device=digits.device).unsqueeze(1)


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"block_encode": block_encode, "block_decode": block_decode, "block_accumulate": block_accumulate}
)
"""By name of the op."""
