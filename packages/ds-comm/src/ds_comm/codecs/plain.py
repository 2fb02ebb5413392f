"""What codecs share: their arguments are checked, and errors and sums come from two functions of each."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .layout import check_coded, check_decoded, check_sum


class PlainCodec(ABC):
    """A codec in torch operations; plays the role ``Codec``."""

    __slots__ = ()

    @property
    def meaning(self) -> str:
        """What payloads stand for, in a few words that are equal on all ranks whose codecs understand each other."""
        return repr(self)

    @abstractmethod
    def payload_bytes(self, numel: int) -> int:
        """Return the bytes of the payload of ``numel`` elements."""

    @torch.no_grad()
    def encode(self, x: Tensor, *, error: Tensor | None = None, payload: Tensor | None = None) -> Tensor:
        """Code ``x``, plus ``error`` where there is one.

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
        num_bytes = self.payload_bytes(x.numel())
        if payload is None:
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=x.device)
        check_coded(x, error, payload, num_bytes)
        self._encode(x, error, payload)
        return payload

    @torch.no_grad()
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
        check_decoded(out, payload, self.payload_bytes(out.numel()))
        self._decode(payload, out)
        return out

    @torch.no_grad()
    def accumulate(self, payload: Tensor, out: Tensor, *, scale: float = 1.0) -> Tensor:
        """Add ``scale`` times what ``payload`` stands for to ``out``.

        Args:
            payload: From :meth:`encode`. Its bytes are not checked.
            out: Float32, contiguous, of as many elements as were coded.
            scale: Factor; in float32, before the addition.

        Returns:
            ``out``.

        Raises:
            ValueError: If data types, lengths, devices or layouts do not fit.
        """
        check_sum(out, payload, self.payload_bytes(out.numel()))
        self._accumulate(payload, out, scale)
        return out

    @abstractmethod
    def _code(self, values: Tensor, payload: Tensor) -> Tensor:
        """Write the payload of ``values`` (1D, float32), and return what it stands for, float32."""

    @abstractmethod
    def _values(self, payload: Tensor, numel: int, factor: float) -> Tensor:
        """Return ``factor`` times what ``payload`` stands for: 1D, float32."""

    def _encode(self, x: Tensor, error: Tensor | None, payload: Tensor) -> None:
        values = x.view(-1).to(torch.float32)
        if error is None:
            self._code(values, payload)
        else:
            values = values + error.view(-1)
            torch.sub(values, self._code(values, payload), out=error.view(-1))

    def _decode(self, payload: Tensor, out: Tensor) -> None:
        out.view(-1).copy_(self._values(payload, out.numel(), 1.0))

    def _accumulate(self, payload: Tensor, out: Tensor, scale: float) -> None:
        out.view(-1).add_(self._values(payload, out.numel(), scale))
