"""How optimizer state of fewer bytes stands for float32 values, in plain torch: what the codecs mean.

A codec is named by the data type it stores, so a tensor says by itself how to read it:

- ``float32``, ``bfloat16``: the value, rounded to nearest.
- ``bfloat16`` with an int16 tensor beside it (split): the bfloat16 number nearest to a float32, and the 16 bits that
  complete it. Exact; the upper half serves as the weight of a model.
- ``int8`` and ``uint8`` with a bfloat16 scale for each 32 values: signed moments, and second moments by their roots.

[Note: Codes of 8 bits]
Groups of 32 values share a scale s, the largest magnitude as bfloat16. A signed moment m is stored as
q = round(254 m / (s + abs(m))), which is 127 times the compander 2x / (1 + abs(x)) of x = m / s, and comes back as
s q / (254 - abs(q)). A second moment v is stored as q = round(255 sqrt(v) / s), with s of the roots, and at least 1
where v > 0: a moment that came back as 0 would leave eps alone to divide the first one. A group that holds a NaN or an
infinity comes back as NaN. The paper's scales are float16, which ends at 6e-8: bfloat16 has the same size and the
range of float32.

[Note: Weights from outside]
A program may write a bfloat16 weight itself (a mask, a clamp, zeros) and leave the 16 bits below it as they were. The
master is then the new weight plus what is left of the old one, at most half a unit in the weight's last place: it
rounds to the weight that was written. Bits below a zero, or above an infinity, are never written by a step, and do not
count: their sum with the upper half would be NaN. So a finite weight has a finite master, a zero one that is at most
5e-41 and of its sign.

Reference:
    FlashOptim: Optimizers for Memory Efficient Training, 2026, https://arxiv.org/abs/2602.23349.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..checks import GROUP

_CANONICAL_NAN = 0x7FC00000
_EXPONENT = 0x7F80  # of bfloat16


def num_scales(numel: int) -> int:
    """Return how many scales ``numel`` codes of 8 bits have."""
    return (numel + GROUP - 1) // GROUP


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cut float32 into the nearest bfloat16, halfway cases away from zero, and an int16 that completes it.

    Example:
        >>> high, low = split(torch.tensor([1.0, 1.0009765625]))
        >>> high, low
        (tensor([1., 1.], dtype=torch.bfloat16), tensor([   0, 8192], dtype=torch.int16))
    """
    bits = torch.where(x.isnan(), _CANONICAL_NAN, x.contiguous().view(torch.int32))
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    low = (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)
    return high, low


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 that :func:`split` cut; see [Note: Weights from outside] for other pairs.

    Example:
        >>> x = torch.randn(100)
        >>> torch.equal(join(*split(x)), x)
        True
    """
    bits = high.view(torch.int16).to(torch.int32)
    size = bits & 0x7FFF
    foreign = ((size == 0) & (low < 0)) | ((size == _EXPONENT) & (low > 0))
    return ((bits << 16) + low.to(torch.int32).masked_fill(foreign, 0)).view(torch.float32)


def encode_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Store float32 as int8 codes and scales; see [Note: Codes of 8 bits].

    Example:
        >>> encode_signed(torch.tensor([1.0, -0.5, 0.0]))
        (tensor([127, -85,   0], dtype=torch.int8), tensor([1.], dtype=torch.bfloat16))
    """
    groups, largest = _groups(x)
    scale, divisor, valid = _scale(largest)
    codes = (254.0 * (groups / (divisor + groups.abs()))).round_()
    return _flat(torch.where(valid, codes, 0.0).to(torch.int8), x), scale


def encode_roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """Store the roots of float32 as uint8 codes and scales; see [Note: Codes of 8 bits].

    Example:
        >>> encode_roots(torch.tensor([4.0, 1.0, 1e-30, 0.0]))
        (tensor([255, 128,   1,   0], dtype=torch.uint8), tensor([2.], dtype=torch.bfloat16))
    """
    groups, largest = _groups(x)
    scale, divisor, valid = _scale(largest.sqrt())
    codes = groups.sqrt() * (255.0 / divisor)
    codes = torch.where(codes < 255.0, codes, 255.0).round_().maximum((groups > 0.0).float())
    return _flat(torch.where(valid, codes, 0.0).to(torch.uint8), x), scale


def decode(stored: Tensor, beside: Tensor | None = None) -> Tensor:
    """Return the float32 values of ``stored``, in its shape; float32 itself is returned as it is.

    Args:
        stored: Float32, bfloat16, int8 or uint8.
        beside: What the codec keeps beside it: the lower half of split bfloat16, or the scales.

    Raises:
        KeyError: If no codec stores this data type.

    Example:
        >>> decode(*encode_signed(torch.tensor([1.0, -0.5, 0.0])))
        tensor([ 1.0000, -0.5030,  0.0000])
    """
    return _DECODERS[stored.dtype](stored, beside)


def encode_like(x: Tensor, stored: Tensor, beside: Tensor | None = None) -> None:
    """Write ``x`` into ``stored`` and ``beside``, whose data types say how; float32 is taken to be ``x`` itself.

    Example:
        >>> x, stored = torch.tensor([1.0, 2.0]), torch.empty(2, dtype=torch.bfloat16)
        >>> encode_like(x, stored)
        >>> stored
        tensor([1., 2.], dtype=torch.bfloat16)
    """
    if stored.dtype == torch.float32:
        return
    if beside is None:
        stored.copy_(x)
        return
    codes, rest = _ENCODERS[stored.dtype](x)
    stored.copy_(codes)
    beside.copy_(rest)


def _groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of one group each, and the largest magnitude of each; NaN where there is one."""
    padding = num_scales(x.numel()) * GROUP - x.numel()
    groups = torch.nn.functional.pad(x.reshape(-1), (0, padding)).view(-1, GROUP)
    return groups, groups.abs().amax(1)


def _scale(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales, what to divide by in each row, and in which rows there are codes other than 0."""
    scale = largest.to(torch.bfloat16)
    exponent = scale.view(torch.int16) & _EXPONENT
    infinite, zero = exponent == _EXPONENT, exponent == 0
    scale = scale.masked_fill(infinite, torch.nan).masked_fill(zero, 0.0)
    valid = ~(infinite | zero)
    divisor = torch.where(valid, scale.float(), 1.0)
    return scale, divisor[:, None], valid[:, None]


def _flat(codes: Tensor, like: Tensor) -> Tensor:
    return codes.view(-1)[: like.numel()].view(like.shape)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    return scale.float().repeat_interleave(GROUP)[: like.numel()].view(like.shape)


def _decode_bfloat16(stored: Tensor, beside: Tensor | None) -> Tensor:
    return stored.float() if beside is None else join(stored, beside)


def _decode_signed(stored: Tensor, beside: Tensor) -> Tensor:
    codes = stored.float()
    return _spread(beside, stored) * (codes / (254.0 - codes.abs()))


def _decode_roots(stored: Tensor, beside: Tensor) -> Tensor:
    roots = _spread(beside.float() / 255.0, stored) * stored.float()
    return roots * roots


_DECODERS: Mapping[torch.dtype, Callable[..., Tensor]] = MappingProxyType(
    {
        torch.float32: lambda stored, _: stored,
        torch.bfloat16: _decode_bfloat16,
        torch.int8: _decode_signed,
        torch.uint8: _decode_roots,
    }
)
_ENCODERS: Mapping[torch.dtype, Callable[[Tensor], tuple[Tensor, Tensor]]] = MappingProxyType(
    {torch.bfloat16: split, torch.int8: encode_signed, torch.uint8: encode_roots}
)
