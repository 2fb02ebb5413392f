"""Settings of compressed collectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .codecs import BlockCodec, CastCodec, Fp8Codec, HadamardCodec
from .coded.reduction import check_feedback
from .planning import CODES, EXACT

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

    from .codec import Codec

_BLOCK_CODES = ("int8", "int4", "ternary")
_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROTATION = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoConfig:
    """What codes of gradients are chosen for; see [Note: Codes by measured links].

    Example:
        >>> AutoConfig(step_seconds=0.5).max_error
        0.5
    """

    step_seconds: float | None = None
    """Seconds that an optimizer step may take; None: a tenth more than without communication."""

    compute_seconds: float | None = None
    """Seconds of an optimizer step without the exchange of gradients; None: measured in the first steps."""

    max_error: float = 0.5
    """Largest part of a buffer's squares that its code may lose."""

    def __post_init__(self) -> None:
        for name, seconds in (("step_seconds", self.step_seconds), ("compute_seconds", self.compute_seconds)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be positive and finite, or null; got {seconds!r}")
        if not 0 <= self.max_error <= 1:
            raise ValueError(f"max_error must be within 0 ... 1, a part of the squares; got {self.max_error!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionConfig:
    """What is coded, and how.

    Codes are ``int8``, ``int4``, ``ternary``, ``fp8`` (all with a float32 scale for each block), ``bf16`` and ``fp16``.
    There is no ``sign``: it has no zero, which padding and rows without a gradient need.

    Example:
        >>> CompressionConfig(weights="int8", gradients="int4").block
        256
    """

    weights: str | None = None
    """Code of gathered weights; None: exact."""

    gradients: str | None = None
    """Code of reduced gradients; None: exact."""

    auto: AutoConfig | None = None
    """Choose codes of gradients by measured links, in place of ``gradients``; None: do not."""

    block: int = 256
    """Elements that share a scale: a multiple of 64 in 64 ... 1024."""

    error_feedback: bool = True
    """Whether what a code lacks of a gradient is added to the next one, for 4 bytes of memory per parameter."""

    error_beta: float = 0.0
    """Decay of errors: what is added to the next gradient is ``error_beta`` times what was added to this one, plus
    ``1 - error_beta`` times what the code lacked (LoCo; 0.8 there). 0: all of it, so that nothing is ever lost."""

    error_reset: int | None = None
    """Reductions of a buffer after which its errors are dropped (LoCo; 1024 there); None: never."""

    weight_differences: bool = False
    """Whether weights are coded as differences to what all ranks decoded last, for 4 bytes of memory per parameter.
    Meant for stages 1 and 2."""

    hadamard: bool = False
    """Whether gradients are rotated before they are coded, 64 by 64, which helps integers with large elements."""

    def __post_init__(self) -> None:
        for name, code in (("weights", self.weights), ("gradients", self.gradients)):
            if code is not None and code not in (*_BLOCK_CODES, "fp8", *_CASTS):
                raise ValueError(
                    f"{name} must be one of {', '.join((*_BLOCK_CODES, 'fp8', *_CASTS))}, or null; got {code!r}"
                )
        BlockCodec(code="int8", block=self.block)  # checks it
        check_feedback(self.error_beta, self.error_reset)
        if (self.error_beta or self.error_reset) and not (self.error_feedback and self.gradients):
            raise ValueError(
                f"error_beta = {self.error_beta}, error_reset = {self.error_reset} are about errors of gradients, but "
                f"gradients = {self.gradients!r} and error_feedback = {self.error_feedback}; set both, or leave these"
            )
        if self.weight_differences and self.weights is None:
            raise ValueError("weight_differences = True says how weights are coded, but weights = None; set weights")
        if self.auto is not None and self.gradients is not None:
            raise ValueError(f"auto chooses codes of gradients, but gradients = {self.gradients!r}; keep one of them")
        if self.hadamard and self.gradients not in (*_BLOCK_CODES, "fp8"):
            raise ValueError(f"hadamard = True is of no use with gradients = {self.gradients!r}; set a code in blocks")

    def codec_of_weights(self, kernels: KernelBackend | None) -> Codec | None:
        """Return the codec of weights; ``kernels`` are its fused kernels."""
        return None if self.weights is None else self._codec(self.weights, kernels)

    def codec_of_gradients(self, kernels: KernelBackend | None) -> Codec | None:
        """Return the codec of gradients; ``kernels`` are its fused kernels."""
        if self.gradients is None:
            return None
        codec = self._codec(self.gradients, kernels)
        return HadamardCodec(inner=codec, size=_ROTATION) if self.hadamard else codec

    def codecs_to_choose_from(self, kernels: KernelBackend | None) -> dict[str, Codec]:
        """Return by name what ``auto`` chooses from, beside exact numbers."""
        return {code: self._codec(code, kernels) for code in CODES if code != EXACT}

    def _codec(self, code: str, kernels: KernelBackend | None) -> Codec:
        if code in _CASTS:
            return CastCodec(dtype=_CASTS[code])
        return Fp8Codec(block=self.block) if code == "fp8" else BlockCodec(code=code, block=self.block, kernels=kernels)
