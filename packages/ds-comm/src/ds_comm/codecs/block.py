"""Codes of 1 to 8 bits, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .digits import code_rows, pack, unpack
from .layout import CODES, Layout, check_layout
from .native import NativeBlocks, native_codes
from .plain import PlainCodec

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

__all__ = ["BlockCodec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCodec(PlainCodec):
    """Plays the role ``Codec``: a scale for each block, and 1, 1.6, 4 or 8 bits for each element.

    Payloads lie as in [Note: Block payload] in ``layout.py``, and are the same to the bit on every device and on every
    number of threads, with ``kernels`` and without. Bytes of 1024 elements, blocks of 256: 144 (sign), 224 (ternary),
    528 (int4), 1040 (int8). Without ``kernels`` it takes about 5 temporaries of float32 of ``x``'s length.

    A block in which something is not finite decodes to what is not finite nearly everywhere, so that a loss scaler
    notices. A float16 scale saturates at 65504; where a scale of integers is smaller than the smallest normal float32,
    all its elements become 0.

    Example:
        >>> codec = BlockCodec(code="ternary", block=64)
        >>> x, error = torch.linspace(-1, 1, 100), torch.zeros(100)
        >>> payload = codec.encode(x, error=error)
        >>> len(payload)  # 2 scales, 13 + 8 bytes of codes
        29
        >>> torch.allclose(codec.decode(payload, torch.empty(100)) + error, x)
        True

    Reference:
        ``sign``: Sai Praneeth Karimireddy and others, Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes, 2019 (mean); Hanlin Tang and others, 1-bit Adam, 2021 (root mean square). ``ternary``: Fengfu Li and
        others, Ternary Weight Networks, 2016. Integers in blocks: Tim Dettmers, 8-Bit Approximations for Parallelism
        in Deep Learning, 2015.
    """

    code: str
    """``sign`` (1 bit), ``ternary`` (1.6 bits, with an exact zero), ``int4`` or ``int8``."""
    block: int = 256
    """Consecutive elements that share a scale: a multiple of 64 in 64 ... 1024."""
    scale_dtype: torch.dtype = torch.float32
    """Type of the scales in the payload: float32 or float16. Integers are rounded with the scale as stored."""
    scale: str = "mean"
    """Scale of ``sign``: ``mean`` of the magnitudes, which leaves the least error, or ``rms``, their root mean square,
    which keeps the norm, but on blocks of mostly zeros leaves more than there was. Of no meaning for other codes."""
    kernels: KernelBackend | None = None
    """Where fused kernels ``block_encode``, ``block_decode`` and ``block_accumulate`` come from; None: this
    package's own, for float32 on a CPU, where it was built with a compiler. What there is no kernel of is coded by
    torch operations, into the same bytes. There are no kernels that fit ``rms``."""

    def __post_init__(self) -> None:
        check_layout(self._layout)
        if self.scale not in ("mean", "rms"):
            raise ValueError(f"scale must be 'mean' or 'rms'; got {self.scale!r}")

    @property
    def meaning(self) -> str:
        """What payloads stand for, in words; the same with any kernels, and for the code of ds-kernels.

        Example:
            >>> BlockCodec(code="int4", block=64).meaning
            'int4 in blocks of 64, scales torch.float32'
        """
        return f"{self.code} in blocks of {self.block}, scales {self.scale_dtype}" + (
            ", rms" if self.scale == "rms" else ""
        )

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements.

        Example:
            >>> BlockCodec(code="sign", block=1024, scale_dtype=torch.float16).payload_bytes(1_000_000)
            126954
        """
        return self._layout.payload_bytes(numel)

    @property
    def _layout(self) -> Layout:
        return Layout(self.code, self.block, self.scale_dtype)

    def _kernel(self, op: str, tensor: Tensor) -> Callable[..., Any] | None:
        """Return what codes ``tensor`` in one pass; None: torch operations have to."""
        if self.kernels is not None:
            return self.kernels.find(op, tensor.device, tensor.dtype)
        native = native_codes(tensor.device)
        return None if native is None else NativeBlocks(native).find(op, tensor.dtype)

    def _encode(self, x: Tensor, error: Tensor | None, payload: Tensor) -> None:
        kernel = None if self.scale == "rms" else self._kernel("block_encode", x)
        if kernel is None:
            PlainCodec._encode(self, x, error, payload)
        else:
            kernel(x, error, payload, self._layout)

    def _decode(self, payload: Tensor, out: Tensor) -> None:
        kernel = self._kernel("block_decode", out)
        if kernel is None:
            PlainCodec._decode(self, payload, out)
        else:
            kernel(out, payload, self._layout)

    def _accumulate(self, payload: Tensor, out: Tensor, scale: float) -> None:
        kernel = self._kernel("block_accumulate", out)
        if kernel is None:
            PlainCodec._accumulate(self, payload, out, scale)
        else:
            kernel(out, payload, self._layout, scale)

    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        sent = torch.empty_like(values)
        for part in self._layout.parts(values.numel()):
            coded = code_rows(values[part.elements].view(part.blocks, -1), self._layout, rms=self.scale == "rms")
            payload[part.scales] = coded.scales.view(-1).view(torch.uint8)
            pack(coded.digits, payload[part.codes].view(part.blocks, -1), CODES[self.code])
            torch.mul(coded.values, coded.scales.to(torch.float32), out=sent[part.elements].view(part.blocks, -1))
        return sent

    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        found = torch.empty(numel, device=payload.device)
        for part in self._layout.parts(numel):
            # cloned: a payload within a message need not be aligned for floats
            scales = payload[part.scales].clone().view(self.scale_dtype).to(torch.float32) * factor
            values = unpack(payload[part.codes].view(part.blocks, -1), part.length, CODES[self.code])
            torch.mul(values, scales.unsqueeze(1), out=found[part.elements].view(part.blocks, -1))
        return found
