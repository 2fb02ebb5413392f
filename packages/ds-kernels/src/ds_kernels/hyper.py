"""Numbers of one step of each optimizer but Adam, the same for every element it touches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LionHyper:
    """Numbers of one Lion step.

    Example:
        >>> LionHyper(lr=1e-4).beta2
        0.99

    Reference:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """

    lr: float
    """Learning rate."""
    beta1: float = 0.9
    """Weight of the old moment in the direction."""
    beta2: float = 0.99
    """Decay of the moment."""
    weight_decay: float = 0.0
    """The parameter is multiplied by ``1 - lr * weight_decay``."""
    scale: float = 1.0
    """Factor on the gradient."""
    zero_grad: bool = False
    """Set the gradient to 0 in the same pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdagradHyper:
    """Numbers of one Adagrad step.

    Example:
        >>> AdagradHyper(step=1, lr=1e-2).eps
        1e-10

    Reference:
        Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011.
    """

    step: int
    """Index of this step, from 1."""
    lr: float
    """Learning rate."""
    lr_decay: float = 0.0
    """The learning rate is divided by ``1 + (step - 1) * lr_decay``."""
    eps: float = 1e-10
    """Added to the root of the sum of squares."""
    weight_decay: float = 0.0
    """Added to the gradient, times the parameter."""
    scale: float = 1.0
    """Factor on the gradient."""
    zero_grad: bool = False
    """Set the gradient to 0 in the same pass."""

    def __post_init__(self) -> None:
        _check_step(self.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class SgdHyper:
    """Numbers of one step of stochastic gradient descent.

    Example:
        >>> SgdHyper(lr=0.1, momentum=0.9).nesterov
        False

    Reference:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.
    """

    lr: float
    """Learning rate."""
    momentum: float = 0.0
    """Decay of the momentum buffer; 0: there is none."""
    dampening: float = 0.0
    """The gradient enters the buffer with ``1 - dampening``, but in the first step with 1."""
    weight_decay: float = 0.0
    """Added to the gradient, times the parameter."""
    nesterov: bool = False
    """Step along ``gradient + momentum * buffer`` instead of the buffer."""
    first: bool = False
    """Whether the buffer starts with this step."""
    scale: float = 1.0
    """Factor on the gradient."""
    zero_grad: bool = False
    """Set the gradient to 0 in the same pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LambHyper:
    """Numbers of one LAMB step.

    Example:
        >>> LambHyper(step=1, lr=1e-3).eps
        1e-08

    Reference:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
    """

    step: int
    """Index of this step, from 1; it sets the bias corrections ``1 - beta**step``."""
    lr: float
    """Learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Times the parameter, added to Adam's direction."""
    min_ratio: float = 0.01
    """Smallest ratio of the norms. The default is DeepSpeed's."""
    max_ratio: float = 10.0
    """Largest ratio of the norms. The default is DeepSpeed's."""
    scale: float = 1.0
    """Factor on the gradient."""
    zero_grad: bool = False
    """Set the gradient to 0 in the pass that reads it."""

    def __post_init__(self) -> None:
        _check_step(self.step)


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"step counts from 1, so that 1 - beta**step is not 0; got {step}")
