"""Settings of the sharded optimizers: ``optimizer.params``, with DeepSpeed's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..codecs import BlockCodec, E8Codec

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

    from ..codec import Codec

_CODES = ("e8", "sign", "ternary", "int4", "int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowLinkConfig:
    """What the optimizers for slow links have in common. Defaults are DeepSpeed's where it has the key."""

    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Times the parameter, added to the update."""
    bias_correction: bool = False
    """Divide the moments by ``1 - beta**step``, until the variance is frozen and once, for good, then. DeepSpeed has
    the key, with the default true, and ignores it: false is what it computes."""
    code: str = "e8"
    """Code of messages: ``e8`` and ``sign`` (0.133 bytes per parameter and hop), ``ternary`` (0.22), ``int4`` or
    ``int8``."""
    block: int | None = None
    """Elements that share a scale: a multiple of 64 in 64 ... 1024; None: 512 for ``e8``, 256 for others."""
    amsgrad: bool = False
    """Only False: there is no such variant."""
    eps_inside_sqrt: bool = False
    """Only False: ``eps`` is added to the root."""
    cuda_aware: bool = False
    """Without effect: messages go over the engine's process group. Accepted because DeepSpeed's files may hold it."""
    comm_backend_name: str = "nccl"
    """Likewise."""

    def __post_init__(self) -> None:
        if self.code not in _CODES:
            raise ValueError(f"code must be one of {', '.join(_CODES)}; got {self.code!r}")
        self.codec(None)  # checks the block
        for name, value in (("amsgrad", self.amsgrad), ("eps_inside_sqrt", self.eps_inside_sqrt)):
            if value:
                raise ValueError(f"{name} must be false, DeepSpeed's 1-bit optimizers have no such variant; got True")

    def codec(self, kernels: KernelBackend | None) -> Codec:
        """Return the codec; ``kernels`` are the fused kernels of block codes."""
        if self.code == "e8":
            return E8Codec() if self.block is None else E8Codec(block=self.block)
        block = 256 if self.block is None else self.block
        # a scale of float16 keeps the two hops of a sign together below 0.27 bytes
        scales = torch.float16 if self.code == "sign" else torch.float32
        return BlockCodec(code=self.code, block=block, scale_dtype=scales, kernels=kernels)


@dataclass(frozen=True, kw_only=True, slots=True)
class OneBitAdamConfig(SlowLinkConfig):
    """Settings of :class:`ds_comm.sharded.one_bit_adam.OneBitAdam`.

    Example:
        >>> OneBitAdamConfig(freeze_step=400, code="sign").freeze_step
        400
    """

    freeze_step: int = 100_000
    """Last step of the warm-up: 15 to 25 % of all steps."""

    def __post_init__(self) -> None:
        SlowLinkConfig.__post_init__(self)
        if self.freeze_step < 1:
            raise ValueError(f"freeze_step must be at least 1: the variance is made until then; got {self.freeze_step}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OneBitLambConfig(OneBitAdamConfig):
    """Settings of :class:`ds_comm.sharded.one_bit_lamb.OneBitLamb`; defaults are DeepSpeed's.

    Example:
        >>> OneBitLambConfig(freeze_step=400).max_coeff
        10.0
    """

    max_coeff: float = 10.0
    """Largest ratio of norms."""
    min_coeff: float = 0.01
    """Smallest ratio of norms."""
    coeff_beta: float = 0.9
    """Decay of the average of ratios."""
    factor_max: float = 4.0
    """Largest factor."""
    factor_min: float = 0.5
    """Smallest factor."""
    factor_threshold: float = 0.1
    """By what part a factor may differ from the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroOneAdamConfig(SlowLinkConfig):
    """Settings of :class:`ds_comm.sharded.zero_one_adam.ZeroOneAdam`; defaults are DeepSpeed's.

    Example:
        >>> ZeroOneAdamConfig(var_freeze_step=400).local_step_clipper
        16
    """

    var_freeze_step: int = 100_000
    """Last step at which the variance may change."""
    var_update_scaler: int = 16
    """Updates of the variance between doublings of its interval."""
    local_step_scaler: int = 32_678
    """Steps between doublings of the local interval."""
    local_step_clipper: int = 16
    """Largest local interval."""
