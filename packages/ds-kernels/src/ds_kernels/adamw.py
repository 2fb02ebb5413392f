"""Adam and AdamW: as torch optimizers, and over a partitioner's shards; the step is one fused kernel per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import ParamsT

from .config import AdamConfig, check_hyperparameters
from .fused import FusedOptimizer
from .hyper import AdamHyper
from .maker import FusedMaker

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

# With it, 1 - beta**step is exactly 1 for every beta below 1 that float64 holds: no bias correction.
_UNCORRECTED_STEP = 2**62


class Adam(FusedOptimizer):
    """Adam with weight decay added to the gradient (L2), one fused kernel per parameter.

    Takes the place of ``torch.optim.Adam`` for float32 and bfloat16 parameters: same formula, same state under the same
    names, so that a ``state_dict`` goes from either to the other. Not offered: ``amsgrad``, ``maximize``,
    ``capturable``, ``differentiable``, sparse gradients. A step moves 28 bytes per element.

    State in fewer bytes: bfloat16 parameters have an exact float32 master at 2 bytes per element (14 with weight,
    gradient and float32 moments; a step moves 26), and ``moments`` may be ``bf16`` (10 bytes; 18) or ``int8`` (8.1
    bytes; 14.3).

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Added to the gradient, times the parameter.
        bias_correction: Divide the moments by ``1 - beta**step``.
        moments: How moments are stored: ``fp32``, ``bf16`` or ``int8``.
        zero_grad: Set gradients to 0 in the pass that reads them.
        kernels: The backend to run on; None takes the process's choice at each step, see :func:`use_backend`.

    Raises:
        ValueError: If a hyperparameter is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adam([weight], lr=0.5)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.5000, 1.5000])

    Reference:
        Diederik P. Kingma and Jimmy Ba, Adam: A Method for Stochastic Optimization, 2015.
    """

    op = "adamw"
    moments = MappingProxyType({"exp_avg": 0, "exp_avg_sq": 1})
    _decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        **storage: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": self._decoupled,
        }
        super().__init__(params, defaults, **storage)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check learning rate, betas, eps and weight decay."""
        check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def hyper(self, group: Mapping[str, Any], step: int, scale: float, *, zero_grad: bool) -> AdamHyper:
        """Return the numbers of a step."""
        beta1, beta2 = group["betas"]
        return AdamHyper(
            step=step if group["bias_correction"] else _UNCORRECTED_STEP,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            scale=scale,
            zero_grad=zero_grad,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = self._decoupled  # a state_dict may be the other class's


class AdamW(Adam):
    """Adam with decoupled weight decay, one fused kernel per parameter.

    Takes the place of ``torch.optim.AdamW`` for float32 and bfloat16 parameters; see :class:`Adam`.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Each step multiplies the parameter by ``1 - lr * weight_decay``.
        bias_correction: Divide the moments by ``1 - beta**step``.
        storage: ``moments``, ``zero_grad`` and ``kernels``, as in :class:`Adam`.

    Raises:
        ValueError: If a hyperparameter is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = AdamW([weight], lr=0.5, weight_decay=0.5)
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.2500])

    Reference:
        Ilya Loshchilov and Frank Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        **storage: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction=bias_correction, **storage)


class AdamMaker(FusedMaker):
    """Makes an :class:`AdamW` or :class:`Adam` over 1D shards, and runs its step.

    Args:
        config: Hyperparameters for groups that do not name their own; ``adam_w_mode`` picks the class.
        kernels: The backend to run on; None takes the process's choice at each step.

    Example:
        >>> import torch
        >>> optimizer = AdamMaker(AdamConfig(lr=0.1)).make([{"params": [torch.zeros(4)]}])
        >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"]
        ('AdamW', 0.1)
    """

    def __init__(self, config: AdamConfig, *, kernels: KernelBackend | None = None) -> None:
        settings = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay", "bias_correction")}
        super().__init__(AdamW if config.adam_w_mode else Adam, settings, kernels=kernels)
