"""Lion: steps of one size, in the direction of a sign."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.optim.optimizer import ParamsT

from ..config import check_hyperparameters
from ..fused import FusedOptimizer
from ..hyper import LionHyper


class FusedLion(FusedOptimizer):
    """Lion: ``p <- p (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g)``, ``m <- beta2 m + (1 - beta2) g``.

    A step moves 20 bytes per element in float32; of a bfloat16 parameter 18, with ``moments="bf16"`` 14, with ``int8``
    12.1.

    Args:
        params: Parameters, or parameter groups; float32, or bfloat16 with an exact float32 master.
        lr: Learning rate; the paper takes a third to a tenth of AdamW's. The default is DeepSpeed's.
        betas: Weight of the old moment in the direction, and decay of the moment. The defaults are DeepSpeed's; the
            paper has 0.99 for the second.
        weight_decay: Decoupled weight decay.
        storage: ``moments``, ``zero_grad`` and ``kernels``, as in :class:`ds_kernels.Adam`.

    Raises:
        ValueError: If a setting is out of its bounds.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = FusedLion([weight], lr=0.25)
        >>> weight.grad = torch.tensor([10.0, -0.1])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.7500, 1.2500])

    Reference:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """

    op = "lion"
    moments = MappingProxyType({"exp_avg": 0})
    counted = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        **storage: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **storage)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check learning rate, betas and weight decay."""
        check_hyperparameters(group["lr"], group["betas"], 0.0, group["weight_decay"])

    def hyper(self, group: Mapping[str, Any], step: int, scale: float, *, zero_grad: bool) -> LionHyper:
        """Return the numbers of a step."""
        del step
        beta1, beta2 = map(float, group["betas"])
        numbers = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
        return LionHyper(**numbers, scale=scale, zero_grad=zero_grad)
