"""Adam under the names and the settings of DeepSpeed's classes."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..adamw import Adam


class FusedAdam(Adam):
    """AdamW, or Adam with ``adam_w_mode`` false; the settings are those of DeepSpeed's ``FusedAdam``.

    Args:
        params: Parameters, or parameter groups; float32, or bfloat16 with an exact float32 master.
        lr: Learning rate.
        bias_correction: Divide the moments by ``1 - beta**step``.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        adam_w_mode: True: decoupled weight decay; False: added to the gradient.
        weight_decay: Weight decay.
        amsgrad: Only False.
        set_grad_none: Whether :meth:`zero_grad` drops gradients.
        storage: ``moments``, ``zero_grad`` and ``kernels``, as in :class:`ds_kernels.Adam`.

    Raises:
        ValueError: If a setting is out of its bounds, or ``amsgrad`` is true.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = FusedAdam([weight], lr=0.5, moments="int8")
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([0.5000, 1.5000])

    Reference:
        Ilya Loshchilov and Frank Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - DeepSpeed's signature
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,  # noqa: FBT001, FBT002
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,  # noqa: FBT001, FBT002
        weight_decay: float = 0.0,
        amsgrad: bool = False,  # noqa: FBT001, FBT002
        set_grad_none: bool = True,  # noqa: FBT001, FBT002
        **storage: Any,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad must be false, AMSGrad is not offered; got True; use torch.optim.AdamW")
        self._decoupled = adam_w_mode
        self._set_grad_none = set_grad_none
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction=bias_correction, **storage)

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # noqa: FBT001 - torch's signature
        """Drop the gradients, or set them to 0; None does what ``set_grad_none`` says."""
        super().zero_grad(self._set_grad_none if set_to_none is None else set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decoupled": self._decoupled, "_set_grad_none": self._set_grad_none}


class CpuAdam(FusedAdam):
    """AdamW or Adam with the settings of DeepSpeed's ``DeepSpeedCPUAdam``; runs on every device that has a backend.

    Deviation: bfloat16 parameters have an exact float32 master (2 bytes per element), where DeepSpeed's steps are lost
    when they are smaller than half a unit in the last place.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        bias_correction: Divide the moments by ``1 - beta**step``.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Weight decay.
        amsgrad: Only False.
        adamw_mode: True: decoupled weight decay; False: added to the gradient.
        fp32_optimizer_states: False: moments of bfloat16 parameters are bfloat16.
        storage: ``moments``, ``zero_grad`` and ``kernels``, as in :class:`ds_kernels.Adam`.

    Raises:
        ValueError: If a setting is out of its bounds, or ``amsgrad`` is true.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = CpuAdam([weight], lr=0.5, fp32_optimizer_states=False)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> weight.detach(), optimizer.state[weight]["exp_avg"].dtype
        (tensor([0.5000, 0.5000], dtype=torch.bfloat16), torch.bfloat16)
    """

    def __init__(  # noqa: PLR0913, PLR0917 - DeepSpeed's signature
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,  # noqa: FBT001, FBT002
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,  # noqa: FBT001, FBT002
        adamw_mode: bool = True,  # noqa: FBT001, FBT002
        fp32_optimizer_states: bool = True,  # noqa: FBT001, FBT002
        **storage: Any,
    ) -> None:
        self._follow_params = not fp32_optimizer_states
        super().__init__(params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad, **storage)

    def dtype_of(self, name: str, param: torch.Tensor) -> torch.dtype:
        """Return the data type in which the moment ``name`` is stored."""
        if self._follow_params and param.dtype == torch.bfloat16:
            return torch.bfloat16
        return super().dtype_of(name, param)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_follow_params": self._follow_params}
