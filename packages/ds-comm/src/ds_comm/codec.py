"""What a code for compressed messages is: floats in, bytes out, and back."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Turns tensors into payloads of bytes and back.

    Pure: what is lost is handed back in ``error``, and nothing is remembered. A payload is the same to the bit on every
    machine, since whoever receives it must decode what its sender believes it to stand for. The ``BlockCodec`` of
    ds-kernels plays this role, too.
    """

    @property
    def block(self) -> int:
        """Elements that are coded together: a part that begins at a multiple of it has the codes of the whole."""

    @property
    def meaning(self) -> str:
        """What payloads stand for, in a few words that are equal on all ranks whose codecs understand each other."""

    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements."""

    def encode(self, x: Tensor, *, error: Tensor | None = None, payload: Tensor | None = None) -> Tensor:
        """Code ``x``, plus ``error`` where there is one.

        Args:
            x: Contiguous; float32, bfloat16 or float16.
            error: Float32, as many elements; becomes ``x + error`` less what the payload stands for.
            payload: Where the bytes go, ``[payload_bytes(x.numel())]``, uint8; None: new memory.

        Returns:
            The payload.
        """

    def decode(self, payload: Tensor, out: Tensor) -> Tensor:
        """Write what ``payload`` stands for into ``out`` (contiguous), and return it."""

    def accumulate(self, payload: Tensor, out: Tensor, *, scale: float = 1.0) -> Tensor:
        """Add ``scale`` times what ``payload`` stands for to ``out`` (float32, contiguous), and return it."""


def check_codec(name: str, codec: object) -> None:
    """Refuse the name of a code in place of a codec.

    Raises:
        ValueError: ``codec`` is a string.

    Example:
        >>> check_codec("weights", None)
    """
    if isinstance(codec, str):
        raise ValueError(
            f"{name} must be a codec, not a name: such as ds_comm.codecs.BlockCodec(code='int4'); got {codec!r}"
        )
