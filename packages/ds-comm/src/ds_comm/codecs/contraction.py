"""How much of a message a code loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..codec import Codec

__all__ = ["contraction"]


@torch.no_grad()
def contraction(x: Tensor, codec: Codec) -> float:
    """Return the contraction factor of ``codec`` on ``x``: the squares it loses, over those of ``x``.

    Error feedback keeps its error bounded as long as this stays below 1; where it does not, the error may grow without
    end. 0 for zeros; not finite where ``x`` is not. Takes two copies of ``x`` in float32 and a payload.

    Example:
        >>> from .block import BlockCodec
        >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> round(contraction(x, BlockCodec(code="sign")), 2), round(contraction(x, BlockCodec(code="int4")), 3)
        (0.36, 0.016)

    Reference:
        Sebastian Stich, Jean-Baptiste Cordonnier and Martin Jaggi, Sparsified SGD with Memory, 2018.
    """
    error = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
    codec.encode(x, error=error)
    whole = x.to(torch.float32).square().sum(dtype=torch.float64)
    return float(torch.where(whole == 0, 0.0, error.square().sum(dtype=torch.float64) / whole))
