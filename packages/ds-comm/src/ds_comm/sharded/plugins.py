"""The entry points of group ``ds.optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .config import OneBitAdamConfig, OneBitLambConfig, SlowLinkConfig, ZeroOneAdamConfig
from .one_bit_adam import OneBitAdam
from .one_bit_lamb import Coefficients, OneBitLamb
from .zero_one_adam import Intervals, ZeroOneAdam

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import BuildContext, OptimizerMaker, ParamGroups, Plugin


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes an optimizer; plays the role ``OptimizerMaker``."""

    kind: Callable[..., torch.optim.Optimizer]
    """The class."""
    settings: Mapping[str, Any]
    """What it is constructed with; a parameter group's own settings win."""
    update: None = None
    """The partitioner runs ``optimizer.step()``."""

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return an optimizer over ``groups``."""
        return self.kind(groups, **self.settings)


@dataclass(frozen=True, slots=True)
class SlowLinkPlugin:
    """Offers one of the optimizers."""

    config_type: type
    """Settings: ``optimizer.params``."""
    maker: Callable[[Any, KernelBackend | None], OptimizerMaker]
    """Makes the maker of the settings."""
    role_version: int = 1
    """Version of the optimizer role."""

    def build(self, config: object, context: BuildContext) -> OptimizerMaker:
        """Return the maker, with the kernels of ``context``."""
        return self.maker(config, context.kernels)


def _shared(config: SlowLinkConfig, kernels: KernelBackend | None) -> dict[str, Any]:
    names = ("lr", "betas", "eps", "weight_decay", "bias_correction")
    return {**{name: getattr(config, name) for name in names}, "codec": config.codec(kernels)}


def _one_bit_adam(config: OneBitAdamConfig, kernels: KernelBackend | None) -> Maker:
    return Maker(OneBitAdam, {**_shared(config, kernels), "freeze_step": config.freeze_step})


def _one_bit_lamb(config: OneBitLambConfig, kernels: KernelBackend | None) -> Maker:
    coefficients = Coefficients(
        coeff=(config.min_coeff, config.max_coeff),
        beta=config.coeff_beta,
        factor=(config.factor_min, config.factor_max),
        threshold=config.factor_threshold,
    )
    settings = {**_shared(config, kernels), "freeze_step": config.freeze_step, "coefficients": coefficients}
    return Maker(OneBitLamb, settings)


def _zero_one_adam(config: ZeroOneAdamConfig, kernels: KernelBackend | None) -> Maker:
    intervals = Intervals(*(getattr(config, name) for name in Intervals._fields))
    return Maker(ZeroOneAdam, {**_shared(config, kernels), "intervals": intervals})


one_bit_adam: Plugin = SlowLinkPlugin(OneBitAdamConfig, _one_bit_adam)
one_bit_lamb: Plugin = SlowLinkPlugin(OneBitLambConfig, _one_bit_lamb)
zero_one_adam: Plugin = SlowLinkPlugin(ZeroOneAdamConfig, _zero_one_adam)
