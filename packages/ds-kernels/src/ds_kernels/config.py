"""Settings of the optimizer plugins, under the names a DeepSpeed config file uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig:
    """``optimizer.params`` of the types ``Adam`` and ``AdamW``.

    Names, meanings and defaults are those of DeepSpeed's own Adam, so that its files work unchanged.

    Example:
        >>> AdamConfig(lr=3e-4, betas=(0.9, 0.95)).weight_decay
        0.0
    """

    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay. The default is DeepSpeed's; that of ``torch.optim.AdamW`` is 0.01."""
    bias_correction: bool = True
    """Divide the moments by ``1 - beta**step``."""
    adam_w_mode: bool = True
    """Type ``Adam`` only: True makes it AdamW, as in DeepSpeed; False adds the decay to the gradient."""
    amsgrad: bool = False
    """Only False: the AMSGrad variant is offered neither here nor by DeepSpeed."""
    fp32_optimizer_states: bool = True
    """Only True: moments are float32."""
    set_grad_none: bool = True
    """Without effect: gradients belong to the partitioner. Accepted because DeepSpeed's files may hold it."""

    def __post_init__(self) -> None:
        check_hyperparameters(self.lr, self.betas, self.eps, self.weight_decay)
        if self.amsgrad:
            raise ValueError("amsgrad must be false, AMSGrad is not offered; got True; use torch.optim.AdamW")
        if not self.fp32_optimizer_states:
            raise ValueError("fp32_optimizer_states must be true, moments are kept in float32; got False")


@dataclass(frozen=True, kw_only=True, slots=True)
class LionConfig:
    """``optimizer.params`` of the type ``Lion``; names, meanings and defaults are DeepSpeed's.

    Example:
        >>> LionConfig(lr=1e-4, betas=(0.9, 0.99)).weight_decay
        0.0
    """

    lr: float = 1e-3
    """Learning rate; the paper takes a third to a tenth of AdamW's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Weight of the old moment in the direction, and decay of the moment; the paper has 0.99 for the second."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    fp32_optimizer_states: bool = True
    """Only True: moments are float32."""
    set_grad_none: bool = True
    """Without effect: gradients belong to the partitioner. Accepted because DeepSpeed's files may hold it."""

    def __post_init__(self) -> None:
        check_hyperparameters(self.lr, self.betas, 0.0, self.weight_decay)
        if not self.fp32_optimizer_states:
            raise ValueError("fp32_optimizer_states must be true, moments are kept in float32; got False")


def check_hyperparameters(lr: float, betas: tuple[float, ...], eps: float, weight_decay: float) -> None:
    """Check the bounds that make an Adam step well defined.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the moments, in [0, 1).
        eps: At least 0.
        weight_decay: At least 0.

    Raises:
        ValueError: If one is out of its bounds, or not a number.

    Example:
        >>> check_hyperparameters(1e-3, (0.9, 1.0), 1e-8, 0.0)
        Traceback (most recent call last):
            ...
        ValueError: betas must be two numbers in [0, 1); got (0.9, 1.0)
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0.0:
            raise ValueError(f"{name} must be at least 0; got {value!r}")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
