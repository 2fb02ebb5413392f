"""The arithmetic of block codes in plain torch, to the bit: scales, digits, bytes. See [Note: Block payload].

Sums over a block run in 64 lanes, which then meet 32, 16, ... 1 apart, so that an implementation in vector registers
can add in the same order. No product is fused with a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import CODES, Code, Layout

_LANES = 64
_THRESHOLD = 0.7


class Coded(NamedTuple):
    """A matrix of which each row is a block."""

    digits: Tensor  # [blocks, length], uint8
    values: Tensor  # [blocks, length], float32: what the digits stand for, in scales
    scales: Tensor  # [blocks, 1], as they are stored


def code_rows(rows: Tensor, layout: Layout, *, rms: bool) -> Coded:
    """Code each row (float32) as one block; ``rms``: the scale of ``sign`` is the root mean square."""
    if layout.code == "sign":
        scales = _root_mean_square(rows) if rms else _mean(rows.abs())
        digits = (rows >= 0).to(torch.uint8)
        return Coded(digits, digits.to(torch.float32).mul_(2).sub_(1), stored(scales, layout.scale_dtype))
    if layout.code == "ternary":
        return _ternary(rows, layout)
    return _integers(rows, layout)


def pack(digits: Tensor, codes: Tensor, code: Code) -> None:
    """Write ``digits`` (``[blocks, length]``, uint8) into bytes ``codes`` (``[blocks, m]``)."""
    blocks, m = codes.shape
    rest = code.digits * m - digits.shape[1]
    spread = F.pad(digits, (0, rest), value=code.values.index(0) if 0 in code.values else 1) if rest else digits
    columns = spread.view(blocks, code.digits, m).unbind(1)
    codes.copy_(columns[0])
    for i, column in enumerate(columns[1:], start=1):
        codes.add_(column, alpha=code.base**i)


def unpack(codes: Tensor, length: int, code: Code) -> Tensor:
    """Return what the digits in bytes ``codes`` (``[blocks, m]``) stand for, in scales: ``[blocks, length]``."""
    blocks, m = codes.shape
    indices = codes.reshape(-1).to(torch.int32)
    out = torch.empty(blocks, code.digits, m, device=codes.device)
    for i, table in enumerate(_values_of_bytes(code, codes.device)):
        out[:, i] = table.index_select(0, indices).view(blocks, m)
    return out.view(blocks, -1)[:, :length]


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``scales`` as they are sent; finite ones stay finite."""
    if dtype == torch.float32:
        return scales
    largest = torch.finfo(dtype).max
    return scales.where((scales <= largest) | ~scales.isfinite(), largest).to(dtype)


def inverse(scales: Tensor) -> Tensor:
    """Return the float32 inverse of ``scales``; 0 where it might overflow."""
    used = scales.to(torch.float32)
    return torch.where(used >= torch.finfo(torch.float32).tiny, 1 / used, 0)


def _values_of_bytes(code: Code, device: torch.device) -> Tensor:
    """Return ``[digits, 256]``: for each byte, what each of its digits stands for."""
    powers = torch.tensor([[code.base**i] for i in range(code.digits)])
    digits = torch.arange(256) // powers % code.base
    return torch.tensor(code.values, dtype=torch.float32)[digits].to(device)


def _ternary(rows: Tensor, layout: Layout) -> Coded:
    size = rows.abs()
    mean = _mean(size)
    large = size > mean * _THRESHOLD
    kept = lane_sum(large.to(torch.float32))
    # nothing is kept of zeros, and of what is not finite, which the mean passes on
    scales = torch.where(kept > 0, lane_sum(size.masked_fill_(~large, 0)) / kept, mean)
    values = rows.sign().masked_fill_(~large, 0)
    return Coded((values + 1).to(torch.uint8), values, stored(scales, layout.scale_dtype))


def _integers(rows: Tensor, layout: Layout) -> Coded:
    code = CODES[layout.code]
    scales = stored(rows.abs().amax(1, keepdim=True) / code.levels, layout.scale_dtype)
    values = (rows * inverse(scales)).nan_to_num_(nan=code.levels).clamp_(-code.levels, code.levels).round_()
    digits = values.to(torch.int8).view(torch.uint8)
    return Coded(digits if code.base == 256 else digits & (code.base - 1), values, scales)


def _mean(rows: Tensor) -> Tensor:
    return lane_sum(rows) / rows.shape[1]


def _root_mean_square(rows: Tensor) -> Tensor:
    # relative to the largest, so that no square overflows
    largest = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return _mean((rows / largest).square_()).sqrt_() * largest


def lane_sum(rows: Tensor) -> Tensor:
    """Return ``[blocks, 1]``: the sum of each row of what is not negative, in the one order."""
    rows = F.pad(rows, (0, -rows.shape[1] % _LANES))
    lanes = rows[:, :_LANES].clone()
    for others in rows.split(_LANES, dim=1)[1:]:
        lanes += others
    while lanes.shape[1] > 1:
        left, right = lanes.chunk(2, dim=1)
        lanes = left + right
    return lanes
