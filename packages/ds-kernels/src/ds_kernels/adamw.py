"""Adam and AdamW: as torch optimizers, and over a partitioner's shards; the step is one fused kernel per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .config import AdamConfig, check_hyperparameters
from .fused import FusedOptimizer
from .registry import Lookup

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import ParamGroups, ShardUpdate

# With it, 1 - beta**step is exactly 1 for every beta below 1 that float64 holds: no bias correction.
_UNCORRECTED_STEP = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamHyper:
    """Numbers of one Adam or AdamW step, the same for every element it touches.

    Example:
        >>> AdamHyper(step=1, lr=1e-3).beta2
        0.999

    Reference:
        Diederik P. Kingma and Jimmy Ba, Adam: A Method for Stochastic Optimization, 2015.
    """

    step: int
    """Index of this step, from 1; it sets the bias corrections ``1 - beta**step``."""
    lr: float
    """Learning rate."""
    beta1: float = 0.9
    """Decay of the first moment. The default is the paper's."""
    beta2: float = 0.999
    """Decay of the second moment. The default is the paper's."""
    eps: float = 1e-8
    """Added to the root of the second moment. The default is the paper's."""
    weight_decay: float = 0.0
    """Weight decay; 0 for none."""
    decoupled: bool = True
    """True: AdamW's decay of the parameter; False: Adam's, added to the gradient."""
    scale: float = 1.0
    """Factor on the gradient: mean, loss scale and clipping in one number."""
    zero_grad: bool = False
    """Set the gradient to 0 in the same pass."""

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step counts from 1, so that 1 - beta**step is not 0; got {self.step}")


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


class ShardStep:
    """One step over the shards of one group, all in this file: a partitioner runs it at each step.

    Args:
        optimizer: Holds the state of each parameter, under the parameter.
        group: One of ``optimizer.param_groups``.
        scale: Factor on the gradients.
        kernels: Those to step with.
    """

    def __init__(
        self,
        optimizer: Adam,
        group: dict[str, Any],
        *,
        scale: float,
        kernels: Lookup,
    ) -> None:
        self._optimizer = optimizer
        self._group = group
        self._scale = scale
        self._kernels = kernels
        self._hypers: dict[int, AdamHyper] = {}  # by step: nearly always one

    def run(self, param: Tensor, grad: Tensor, copy: Tensor | None = None) -> None:
        """Step ``param``, making its state if this is its first, and refresh ``copy``."""
        state = self._optimizer.state[param]
        if not state:
            state.update(self._optimizer.init_state(param, self._group))
        step = int(state["step"].item()) + 1
        hyper = self._hypers.get(step)
        if hyper is None:
            hyper = self._optimizer.hyper(self._group, step, self._scale, zero_grad=False)
            self._hypers[step] = hyper
        adamw = self._kernels[param.device, param.dtype]
        adamw(param, grad, state["exp_avg"], state["exp_avg_sq"], copy=copy, hyper=hyper)
        state["step"].fill_(step)


class ShardMaker:
    """Runs the step of fused optimizers over a partitioner's shards: scale, step and copy in one pass.

    Args:
        make_step: Makes the step of one group: ``(optimizer, group, *, scale, kernels)``.
        find: Makes what finds kernels, given a backend that comes first, or None.
        kernels: The backend to run on; None takes the process's choice at each step.
    """

    def __init__(
        self,
        make_step: Callable[..., Any],
        find: Callable[[KernelBackend | None], Any],
        kernels: KernelBackend | None,
    ) -> None:
        self._make_step = make_step
        self._find = find
        self._found = None if kernels is None else find(kernels)

    @torch.no_grad()
    def update(
        self, optimizer: torch.optim.Optimizer, units: Sequence[Sequence[ShardUpdate]], scale: float
    ) -> Iterator[int]:
        """Step once over all ``units``; a generator, so the step goes on as far as its indices are taken.

        One pass over memory: AdamW moves 28 bytes per element in float32; with bfloat16 gradients and copies also 28,
        where casting, stepping and copying back would move 40.

        Args:
            optimizer: What ``make`` returned.
            units: Shards to step, in units that are wanted together.
            scale: Factor on the gradients.

        Yields:
            The index of each unit when its parameters and copies stand.

        Raises:
            ValueError: If a shard's master is not a parameter of ``optimizer``, or its tensors do not fit.
        """
        step_of = {}
        kernels = self._find(None) if self._found is None else self._found
        for group in optimizer.param_groups:
            group_step = self._make_step(optimizer, group, scale=scale, kernels=kernels)
            step_of.update(dict.fromkeys(group["params"], group_step))
        name = f"{type(self).__name__}.update"
        for index, unit in enumerate(units):
            with torch.profiler.record_function(name):
                for shard in unit:
                    if shard.master not in step_of:
                        raise ValueError(
                            "the master of each shard must be a parameter of the optimizer; got one of "
                            f"{shard.master.numel()} elements in unit {index} that is not; make the "
                            "optimizer over the same shards"
                        )
                    step_of[shard.master].run(shard.master, shard.grad, shard.copy)
            yield index


class AdamMaker(ShardMaker):
    """Makes an :class:`AdamW` or :class:`Adam` over 1D shards, and runs its step.

    Args:
        config: Hyperparameters for groups that do not name their own; ``adam_w_mode`` picks the class.
        kernels: The backend to run on; None takes the process's choice at each step.

    Example:
        >>> optimizer = AdamMaker(AdamConfig(lr=0.1)).make([{"params": [torch.zeros(4)]}])
        >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"]
        ('AdamW', 0.1)
    """

    def __init__(self, config: AdamConfig, *, kernels: KernelBackend | None = None) -> None:
        super().__init__(ShardStep, partial(Lookup, "adamw"), kernels)
        self._config = config
        self._kernels = kernels

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return an optimizer over ``groups``, whose parameters are 1D shards in float32.

        Raises:
            ValueError: If a group's own hyperparameter is out of its bounds.
        """
        kind = AdamW if self._config.adam_w_mode else Adam
        return kind(
            groups,
            self._config.lr,
            self._config.betas,
            self._config.eps,
            self._config.weight_decay,
            bias_correction=self._config.bias_correction,
            kernels=self._kernels,
        )
