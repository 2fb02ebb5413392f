"""How the codes of blocks lie in a payload, and what fits into one.

[Note: Block payload]
``n`` elements are cut into blocks of ``block``; the last one may be shorter. All scales come first, one for each block
(float32 or float16, little-endian), behind them the codes of one block after the other. Several elements share a byte,
as digits of a number in some base; the ``k`` elements of a block fill ``m = ceil(k / digits)`` bytes, and neighbours in
a byte are ``m`` elements apart: digit ``i`` of byte ``j`` is element ``i m + j``. So a block is packed and unpacked by
``digits`` operations on runs of ``m`` elements. Digits behind the end of a block are those of 0.

======= ====== ==== =================== ===================================== ==========================
code    digits base values of digits    scale of a block                      an element's value
======= ====== ==== =================== ===================================== ==========================
sign    8      2    -1, 1               mean (or root mean square) of abs(x)  its sign, that of 0 is +
ternary 5      3    -1, 0, 1            mean of what is above the threshold   its sign if above, else 0
int4    2      16   0 ... 7, -8 ... -1  largest abs(x) / 7                    x / scale to nearest
int8    1      256  0 ... 127, -128 ... largest abs(x) / 127                  x / scale to nearest
======= ====== ==== =================== ===================================== ==========================

What is above the threshold is larger than 0.7 times the mean of abs(x) over the block. Ties are rounded to even.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Data types that are coded."""


class Code(NamedTuple):
    """How elements become digits of a byte; a row of the table in [Note: Block payload]."""

    digits: int  # of a byte
    values: tuple[int, ...]  # by digit: what it stands for, in scales

    @property
    def base(self) -> int:
        """Number of values of a digit."""
        return len(self.values)

    @property
    def levels(self) -> int:
        """Largest value."""
        return max(self.values)


CODES: Mapping[str, Code] = MappingProxyType(
    {
        "sign": Code(8, (-1, 1)),
        "ternary": Code(5, (-1, 0, 1)),
        "int4": Code(2, (*range(8), *range(-8, 0))),
        "int8": Code(1, (*range(128), *range(-128, 0))),
    }
)
"""By name; see [Note: Block payload]."""


class Part(NamedTuple):
    """Consecutive blocks of one length."""

    blocks: int
    length: int  # elements of each
    elements: slice
    scales: slice  # bytes of the payload
    codes: slice  # bytes of the payload


class Layout(NamedTuple):
    """Where scales and codes lie in a payload. See [Note: Block payload]."""

    code: str  # a key of CODES
    block: int  # elements that share a scale
    scale_dtype: torch.dtype  # float32 or float16

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of one block of ``numel`` elements."""
        return -(-numel // CODES[self.code].digits)

    def scale_bytes(self, numel: int) -> int:
        """Bytes of all scales of ``numel`` elements."""
        return -(-numel // self.block) * self.scale_dtype.itemsize

    def payload_bytes(self, numel: int) -> int:
        """Bytes of the whole payload of ``numel`` elements."""
        whole, rest = divmod(numel, self.block)
        return self.scale_bytes(numel) + whole * self.code_bytes(self.block) + self.code_bytes(rest)

    def parts(self, numel: int) -> Iterator[Part]:
        """Yield the whole blocks of ``numel`` elements, then what is left; nothing of what is empty."""
        whole, rest = divmod(numel, self.block)
        element, scale, code = 0, 0, self.scale_bytes(numel)
        for blocks, length in ((whole, self.block), (1, rest)):
            ends = (
                element + blocks * length,
                scale + blocks * self.scale_dtype.itemsize,
                code + blocks * self.code_bytes(length),
            )
            if blocks * length:
                yield Part(blocks, length, slice(element, ends[0]), slice(scale, ends[1]), slice(code, ends[2]))
            element, scale, code = ends


def check_layout(layout: Layout) -> None:
    """Check that a code of this name exists and its settings are in range.

    Raises:
        ValueError: If not.
    """
    if layout.code not in CODES:
        raise ValueError(f"code must be one of {', '.join(CODES)}; got {layout.code!r}")
    check_block(layout.block)
    if layout.scale_dtype not in (torch.float32, torch.float16):
        raise ValueError(f"scale_dtype must be torch.float32 or torch.float16; got {layout.scale_dtype}")


def check_block(block: int) -> None:
    """Check that ``block`` is in range.

    Raises:
        ValueError: If not.
    """
    if not 64 <= block <= 1024 or block % 64:
        raise ValueError(f"block must be a multiple of 64 in 64 ... 1024; got {block}")


def check_coded(x: Tensor, error: Tensor | None, payload: Tensor, num_bytes: int) -> None:
    """Check the tensors of an encoding into ``num_bytes`` bytes.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    _check("x", x, FLOATS)
    _check_payload(payload, x, num_bytes)
    if error is None:
        return
    _check("error", error, (torch.float32,))
    if error.numel() != x.numel() or error.device != x.device:
        raise ValueError(
            f"error must be on {x.device} and have {x.numel()} elements, as x; got {error.numel()} on {error.device}"
        )


def check_decoded(out: Tensor, payload: Tensor, num_bytes: int) -> None:
    """Check the tensors of a decoding of ``num_bytes`` bytes.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    _check("out", out, FLOATS)
    _check_payload(payload, out, num_bytes)


def check_sum(out: Tensor, payload: Tensor, num_bytes: int) -> None:
    """Check the tensors of an addition of what ``num_bytes`` bytes stand for.

    Raises:
        ValueError: If data types, lengths, devices or layouts do not fit.
    """
    _check("out", out, (torch.float32,))
    _check_payload(payload, out, num_bytes)


def _check_payload(payload: Tensor, x: Tensor, num_bytes: int) -> None:
    _check("payload", payload, (torch.uint8,))
    if payload.numel() != num_bytes or payload.device != x.device:
        raise ValueError(
            f"{x.numel()} elements on {x.device} have a payload of {num_bytes} bytes there; got {payload.numel()} on "
            f"{payload.device}; make it with payload_bytes()"
        )


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}; got {tensor.dtype}; convert it with .to()")
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be dense and contiguous; got {tensor.layout} of shape {tuple(tensor.shape)}; pass "
            f"{name}.to_dense() or {name}.contiguous()"
        )
