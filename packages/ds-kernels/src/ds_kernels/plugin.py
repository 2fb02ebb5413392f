"""Entry points: the kernel backends and the optimizers, as plugin objects."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .adamw import AdamMaker
from .backends.cpu import CpuBackend
from .backends.cutlass.backend import CutlassBackend
from .backends.nvrtc.backend import NvrtcBackend
from .backends.reference import ReferenceBackend
from .backends.triton.backend import TritonBackend
from .config import AdamConfig, LionConfig
from .maker import FusedMaker
from .optim.lion import FusedLion

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import BuildContext, OptimizerMaker, Plugin

_logger = logging.getLogger(__package__)


@dataclass(frozen=True, slots=True)
class BackendPlugin:
    """Offers a built-in kernel backend."""

    make: Callable[[], KernelBackend]
    """Makes the backend."""
    role_version: int = 1
    """Version of the backend role."""
    config_type: None = None
    """A backend has no settings of its own."""

    def build(self, config: None, context: BuildContext) -> KernelBackend:
        """Return the backend; ``unusable()`` says whether it can run here."""
        return self.make()


@dataclass(frozen=True, slots=True)
class AdamPlugin:
    """Offers Adam over shards, under one of DeepSpeed's two type names."""

    name: str
    """``Adam`` (AdamW unless ``adam_w_mode`` is false) or ``AdamW`` (always AdamW), as in DeepSpeed."""
    role_version: int = 1
    """Version of the optimizer role."""
    config_type: type[AdamConfig] = AdamConfig
    """Settings: ``optimizer.params``."""

    def build(self, config: AdamConfig, context: BuildContext) -> OptimizerMaker:
        """Return the maker, running on ``context.kernels`` if there are any."""
        if not config.set_grad_none:
            _logger.warning("optimizer.params.set_grad_none=False has no effect: gradients belong to the partitioner")
        if self.name == "AdamW" and not config.adam_w_mode:
            _logger.warning("optimizer.params.adam_w_mode=False has no effect with the type AdamW; use the type Adam")
            config = replace(config, adam_w_mode=True)
        return AdamMaker(config, kernels=context.kernels)


@dataclass(frozen=True, slots=True)
class LionPlugin:
    """Offers Lion over shards."""

    role_version: int = 1
    """Version of the optimizer role."""
    config_type: type[LionConfig] = LionConfig
    """Settings: ``optimizer.params``."""

    def build(self, config: LionConfig, context: BuildContext) -> OptimizerMaker:
        """Return the maker, running on ``context.kernels`` if there are any."""
        if not config.set_grad_none:
            _logger.warning("optimizer.params.set_grad_none=False has no effect: gradients belong to the partitioner")
        settings = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        return FusedMaker(FusedLion, settings, kernels=context.kernels)


cpu: Plugin = BackendPlugin(CpuBackend)
cutlass: Plugin = BackendPlugin(CutlassBackend)
nvrtc: Plugin = BackendPlugin(NvrtcBackend)
reference: Plugin = BackendPlugin(ReferenceBackend)
triton: Plugin = BackendPlugin(TritonBackend)
adam: Plugin = AdamPlugin("Adam")
adamw: Plugin = AdamPlugin("AdamW")
lion: Plugin = LionPlugin()
