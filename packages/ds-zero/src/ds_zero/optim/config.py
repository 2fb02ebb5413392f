"""Settings of the optimizers, as a configuration file gives them: ``optimizer.params``, with DeepSpeed's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LambConfig:
    """Settings of :class:`ds_zero.optim.Lamb`.

    Example:
        >>> LambConfig(lr=1e-3).max_coeff
        10.0
    """

    lr: float = 1e-3
    """Learning rate. The default is DeepSpeed's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment. The default is the paper's."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Times the parameter, added to Adam's direction."""
    bias_correction: bool = True
    """Divide the moments by ``1 - beta**step``."""
    max_coeff: float = 10.0
    """Largest ratio of a tensor's norm to its step's. The default is DeepSpeed's."""
    min_coeff: float = 0.01
    """Smallest ratio. The default is DeepSpeed's."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_coeff <= self.max_coeff:
            raise ValueError(f"min_coeff must lie between 0 and max_coeff = {self.max_coeff}; got {self.min_coeff}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LarsConfig:
    """Settings of :class:`ds_zero.optim.Lars`.

    Example:
        >>> LarsConfig().trust
        0.001
    """

    lr: float = 0.1
    """Global learning rate."""
    momentum: float = 0.9
    """Decay of the velocity."""
    weight_decay: float = 0.0
    """Times the parameter, added to the gradient."""
    trust: float = 1e-3
    """How far to trust that a tensor changes its weights. The default is the paper's."""
    eps: float = 0.0
    """Added to the denominator of the ratio."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig:
    """Settings of :class:`ds_zero.optim.Muon`.

    Example:
        >>> config = MuonConfig(lr=1e-2, adam_lr=1e-4)
        >>> config.lr_of_matrices, config.lr_of_others
        (0.01, 0.0001)
    """

    lr: float | None = None
    """Learning rate of whatever has none of its own, as in DeepSpeed."""
    muon_lr: float | None = None
    """Learning rate of matrices; None: ``lr``, or 0.02."""
    adam_lr: float | None = None
    """Learning rate of all other parameters; None: ``lr``, or 3e-4."""
    momentum: float = 0.95
    """Decay of the momentum. The default is the reference's."""
    weight_decay: float = 0.0
    """Each step multiplies parameters by ``1 - lr * weight_decay``."""
    nesterov: bool = True
    """Whether to look ahead."""
    ns_steps: int = 5
    """Newton-Schulz steps. The default is the reference's."""
    ns_dtype: str = "bfloat16"
    """Data type of these steps: ``bfloat16`` or ``float32``. The default is the reference's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and the second moment. The default is the reference's."""
    eps: float = 1e-10
    """AdamW's addition to the root of the second moment. The default is the reference's."""

    def __post_init__(self) -> None:
        if self.ns_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"ns_dtype is 'bfloat16' or 'float32'; got {self.ns_dtype!r}")
        if self.ns_steps < 1:
            raise ValueError(f"ns_steps must be at least 1; got {self.ns_steps}")

    @property
    def lr_of_matrices(self) -> float:
        """Learning rate of what Muon steps."""
        return _first(self.muon_lr, self.lr, 0.02)

    @property
    def lr_of_others(self) -> float:
        """Learning rate of what AdamW steps."""
        return _first(self.adam_lr, self.lr, 3e-4)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
