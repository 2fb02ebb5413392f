"""Codes for compressed messages: floats in, a few bits each out, with error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends.payload import Layout, check_layout
from .registry import registry

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

__all__ = ["BlockCodec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCodec:
    """Turns tensors into payloads of bytes and back, block by block.

    The layout of a payload is that of [Note: Payload] in ``backends/payload.py``. It is the same to the bit on every
    backend, instruction set and number of threads, so that whoever receives it decodes the same numbers everywhere.
    Blocks are coded each by itself: a part that begins at a multiple of ``block`` has the codes of the whole.

    With error feedback, what the payload lacks is kept and sent along next time: over many steps, the sum of what was
    sent plus the error is the sum of what should have been sent, to float32 rounding. ``encode`` moves 4 bytes for
    each float32 element, 12 with an error; ``decode`` 4, ``accumulate`` 8; and the payload.

    Example:
        >>> codec = BlockCodec(code="int8", block=64)
        >>> x, error = torch.linspace(-1, 1, 100), torch.zeros(100)
        >>> payload = codec.encode(x, error=error)
        >>> len(payload)  # 2 scales, 100 codes
        108
        >>> torch.equal(codec.decode(payload, torch.empty(100)) + error, x)
        True

    Reference:
        ``sign``: Sai Praneeth Karimireddy and others, Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes, 2019 (the mean as scale). ``ternary``: Fengfu Li and others, Ternary Weight Networks, 2016. Integers
        in blocks: Tim Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015.
    """

    code: str
    """``sign`` (1 bit), ``ternary`` (1.6 bits, with an exact zero), ``int4`` or ``int8``."""
    block: int = 256
    """Consecutive elements that share a scale: a multiple of 64 in 64 ... 1024."""
    scale_dtype: torch.dtype = torch.float32
    """Type of the scales in the payload: float32 or float16. Integers are rounded with the scale as stored."""
    kernels: KernelBackend | None = None
    """Backend that comes before the process's choice."""

    def __post_init__(self) -> None:
        check_layout(self._layout)

    @property
    def meaning(self) -> str:
        """What payloads stand for, in words; the same with any kernels, and for the code of ds-comm.

        Example:
            >>> BlockCodec(code="int4", block=64).meaning
            'int4 in blocks of 64, scales torch.float32'
        """
        return f"{self.code} in blocks of {self.block}, scales {self.scale_dtype}"

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements.

        Example:
            >>> BlockCodec(code="sign", block=1024, scale_dtype=torch.float16).payload_bytes(1_000_000)
            126954
        """
        return self._layout.payload_bytes(numel)

    def encode(self, x: Tensor, *, error: Tensor | None = None, payload: Tensor | None = None) -> Tensor:
        """Code ``x``, plus ``error`` where there is one, in one pass.

        Args:
            x: Contiguous; float32, bfloat16 or float16.
            error: Float32, as many elements, contiguous; becomes ``x + error`` less what the payload stands for.
                None: what is lost is lost.
            payload: Where the bytes go, ``[payload_bytes(x.numel())]``, uint8; None: new memory.

        Returns:
            The payload.

        Raises:
            ValueError: If data types, lengths, devices or layouts do not fit.
        """
        if payload is None:
            payload = torch.empty(self.payload_bytes(x.numel()), dtype=torch.uint8, device=x.device)
        kernel = registry().kernel("block_encode", x.device, x.dtype, self.kernels)
        kernel(x, error, payload, self._layout)
        return payload

    def decode(self, payload: Tensor, out: Tensor) -> Tensor:
        """Write what ``payload`` stands for into ``out``.

        Args:
            payload: From :meth:`encode`. Its bytes are not checked.
            out: Contiguous, of as many elements as were coded; float32, bfloat16 or float16.

        Returns:
            ``out``.

        Raises:
            ValueError: If data types, lengths, devices or layouts do not fit.
        """
        registry().kernel("block_decode", out.device, out.dtype, self.kernels)(out, payload, self._layout)
        return out

    def accumulate(self, payload: Tensor, out: Tensor, *, scale: float = 1.0) -> Tensor:
        """Add ``scale`` times what ``payload`` stands for to ``out``.

        Args:
            payload: From :meth:`encode`. Its bytes are not checked.
            out: Float32, contiguous, of as many elements as were coded.
            scale: Factor; multiplied with each block's scale in float32 first.

        Returns:
            ``out``.

        Raises:
            ValueError: If data types, lengths, devices or layouts do not fit.
        """
        kernel = registry().kernel("block_accumulate", out.device, out.dtype, self.kernels)
        kernel(out, payload, self._layout, scale)
        return out

    @property
    def _layout(self) -> Layout:
        return Layout(self.code, self.block, self.scale_dtype)
