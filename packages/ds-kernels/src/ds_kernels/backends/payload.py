"""How block codes lie in memory, and what they ask of their arguments.

[Note: Payload]
A payload holds ``n`` numbers in blocks of ``block`` consecutive ones; the last may be shorter. First come the scales,
one for each block, little-endian, float32 or float16; then the codes, block after block. A code has ``d`` digits in a
byte, and a block of ``k`` elements takes ``m = ceil(k / d)`` bytes. Byte ``j`` of a block holds its elements ``j``,
``j + m``, ``j + 2m``, ...: ``byte[j] = sum over i of digit[j + i m] * base^i``. Elements behind the end are 0.

======= ========= ==== ============================ ================ =======================================
code    d, digits base digit of an element          stands for       scale of a block
======= ========= ==== ============================ ================ =======================================
sign    8         2    1 if x >= 0, else 0          (2 digit - 1) s  mean of abs(x)
ternary 5         3    1 + sign(x), or 1 if x small (digit - 1) s    mean of the abs(x) above the threshold
int4    2         16   round(x / s), -7 ... 7       digit s          max of abs(x) / 7
int8    1         256  round(x / s), -127 ... 127   digit s          max of abs(x) / 127
======= ========= ==== ============================ ================ =======================================

Negative digits are in two's complement. The threshold of ``ternary`` is 0.7 times the mean of abs(x) over the block.
Rounding is to nearest, ties to even; what exceeds the range, because a scale was rounded to float16, is clamped. A
float16 scale saturates at 65504. A scale of an integer code below the smallest normal float32 codes zeros. A block with
NaN or infinity decodes to what is not finite, nearly everywhere: a loss scaler notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS

DIGITS: Mapping[str, int] = MappingProxyType({"sign": 8, "ternary": 5, "int4": 2, "int8": 1})
"""Elements in a byte, by code."""

MAX_BLOCK = 1024


class Layout(NamedTuple):
    """How a payload is laid out. See [Note: Payload]."""

    code: str  # a key of DIGITS
    block: int  # elements that share a scale
    scale_dtype: torch.dtype  # float32 or float16

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of one block of ``numel`` elements."""
        return -(-numel // DIGITS[self.code])

    def scale_bytes(self, numel: int) -> int:
        """Bytes of all scales of ``numel`` elements."""
        return -(-numel // self.block) * self.scale_dtype.itemsize

    def payload_bytes(self, numel: int) -> int:
        """Bytes of the whole payload of ``numel`` elements."""
        blocks, rest = divmod(numel, self.block)
        return self.scale_bytes(numel) + blocks * self.code_bytes(self.block) + self.code_bytes(rest)


def check_layout(layout: Layout) -> None:
    """Check that the code exists and its settings are in range.

    Raises:
        ValueError: If not.
    """
    if layout.code not in DIGITS:
        raise ValueError(f"code must be one of {', '.join(DIGITS)}; got {layout.code!r}")
    if not 64 <= layout.block <= MAX_BLOCK or layout.block % 64:
        raise ValueError(f"block must be a multiple of 64 in 64 ... {MAX_BLOCK}; got {layout.block}")
    if layout.scale_dtype not in (torch.float32, torch.float16):
        raise ValueError(f"scale_dtype must be torch.float32 or torch.float16; got {layout.scale_dtype}")


def check_encode(x: Tensor, error: Tensor | None, payload: Tensor, layout: Layout) -> None:
    """Check the tensors of an encoding.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    _check("x", x, FLOATS)
    _check_payload(payload, x, layout)
    if error is None:
        return
    _check("error", error, (torch.float32,))
    if error.numel() != x.numel() or error.device != x.device:
        raise ValueError(
            f"error must have as many elements as x, {x.numel()}, and lie on {x.device}; got {error.numel()} on "
            f"{error.device}"
        )


def check_decode(out: Tensor, payload: Tensor, layout: Layout, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Check the tensors of a decoding; ``dtypes`` are what ``out`` may be.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    _check("out", out, dtypes)
    _check_payload(payload, out, layout)


def _check_payload(payload: Tensor, x: Tensor, layout: Layout) -> None:
    _check("payload", payload, (torch.uint8,))
    wanted = layout.payload_bytes(x.numel())
    if payload.numel() != wanted or payload.device != x.device:
        raise ValueError(
            f"the payload of {x.numel()} elements must have {wanted} bytes and lie on {x.device}; got "
            f"{payload.numel()} on {payload.device}; payload_bytes() tells the size"
        )


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes or tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be dense, contiguous and {' or '.join(map(str, dtypes))}; got {tensor.layout}, "
            f"{tensor.dtype}, shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride() if tensor.layout is torch.strided else 'none'}; convert it with .to() or .contiguous()"
        )
