"""How an optimizer communicates, and in what code if nothing else is said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..codecs import BlockCodec

_NONFINITE = ("raise", "skip")
_EXACT = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The ranks an optimizer communicates with, and what holds for all its messages.

    Raises:
        ValueError: A setting is none of those possible.

    Example:
        >>> Link(on_nonfinite="skip").exact_dtype
        torch.float32
    """

    group: dist.ProcessGroup | None = None
    """The ranks: gloo, MPI or NCCL. None: all ranks, or this process alone where there is no process group."""
    exact_dtype: torch.dtype = torch.float32
    """Data type of uncompressed messages, in warm-up: float32, or bfloat16 for half the bytes."""
    on_nonfinite: str = "raise"
    """What a step does when a gradient is not finite on some rank: ``raise``, or ``skip``: nothing, and counts it."""

    @property
    def agreed(self) -> dict[str, object]:
        """The settings that all ranks have to give alike."""
        return {"exact_dtype": self.exact_dtype, "on_nonfinite": self.on_nonfinite}

    def __post_init__(self) -> None:
        if self.on_nonfinite not in _NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(_NONFINITE)}; got {self.on_nonfinite!r}")
        if self.exact_dtype not in _EXACT:
            raise ValueError(f"exact_dtype must be one of {', '.join(map(str, _EXACT))}; got {self.exact_dtype}")


def int4_codec() -> BlockCodec:
    """Return the code of gradients that are used as they come: at most 1.07 bytes an element for both hops.

    A variance that is updated with coded gradients sees what codes add, and that grows with the block: among large
    elements small ones step by noise. A block whose largest element is below 2e-7 is sent when it has grown to that.

    Example:
        >>> int4_codec().payload_bytes(1_000_000)
        531250
    """
    return BlockCodec(code="int4", block=64, scale_dtype=torch.float16)
