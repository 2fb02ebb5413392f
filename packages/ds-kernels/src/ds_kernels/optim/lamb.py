"""LAMB: Adam whose step is scaled to the norm of each tensor, for tensors that are whole."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..config import check_hyperparameters
from ..fused import FusedOptimizer
from ..group_step import Kernels, StateOfParam
from ..hyper import LambHyper


class FusedLamb(FusedOptimizer):
    """LAMB, layer-wise adaptive moments, for large batches; the settings are those of DeepSpeed's ``FusedLamb``.

    With Adam's direction ``r = m / (sqrt(v) + eps)`` of bias-corrected moments: ``u = r + weight_decay * p`` and
    ``p <- p - lr c u``, where ``c = |p| / |u|`` is kept within the bounds, and 1 where either norm is 0. A step moves
    40 bytes per element in float32, in two passes. Over parts of tensors the norms need sums over ranks: see
    ``ds_zero.optim``.

    Args:
        params: Parameters, or parameter groups; float32, or bfloat16 with an exact float32 master.
        lr: Learning rate.
        bias_correction: Divide the moments by ``1 - beta**step``.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Times the parameter, added to Adam's direction.
        max_coeff: Largest ratio c.
        min_coeff: Smallest ratio c.
        storage: ``moments``, ``zero_grad`` and ``kernels``, as in :class:`ds_kernels.Adam`.

    Raises:
        ValueError: If a setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = FusedLamb([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()  # by 0.1 * |w| in the direction of the signs
        >>> weight.detach()
        tensor([2.6464, 4.3536])

    Reference:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
    """

    op = "lamb_moments"
    moments = MappingProxyType({"exp_avg": 0, "exp_avg_sq": 1})
    update_kind = "tensor"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,  # noqa: FBT001, FBT002 - DeepSpeed's signature
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        **storage: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults, **storage)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check the bounds."""
        check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        low, high = group["min_coeff"], group["max_coeff"]
        if not 0 <= low <= high:
            raise ValueError(f"min_coeff and max_coeff must be at least 0 and in this order; got {low!r} and {high!r}")

    def hyper(self, group: Mapping[str, Any], step: int, scale: float, *, zero_grad: bool) -> LambHyper:
        """Return the numbers of a step."""
        beta1, beta2 = map(float, group["betas"])
        return LambHyper(
            step=step if group["bias_correction"] else 2**62,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            min_ratio=group["min_coeff"],
            max_ratio=group["max_coeff"],
            scale=scale,
            zero_grad=zero_grad,
        )

    def apply(self, kernels: Kernels, param: Tensor, grad: Tensor, state: StateOfParam, hyper: LambHyper) -> None:
        """Update the moments, then step by the ratio of the norms."""
        squares = kernels(state.op("lamb_moments"), param)(param, grad, *state.moments, hyper=hyper, **state.beside)
        weight, length = squares.sqrt().tolist()
        ratio = min(max(weight / length, hyper.min_ratio), hyper.max_ratio) if weight > 0 and length > 0 else 1.0
        step = kernels(state.op("lamb_step"), param)
        step(param, *state.moments, copy=state.copy, ratio=ratio, hyper=hyper, **state.beside)
