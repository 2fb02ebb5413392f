"""The entry points ``Lamb``, ``Lars`` and ``Muon`` of group ``ds.optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .config import LambConfig, LarsConfig, MuonConfig
from .lamb import Lamb
from .lars import Lars
from .muon import Muon

if TYPE_CHECKING:
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
class OptimizerPlugin:
    """Offers one of the optimizers."""

    config_type: type
    """Settings: ``optimizer.params``."""
    maker: Callable[[Any], OptimizerMaker]
    """Makes the maker of the settings."""
    role_version: int = 1
    """Version of the optimizer role."""

    def build(self, config: object, context: BuildContext) -> OptimizerMaker:
        """Return the maker."""
        del context  # one implementation for all devices
        return self.maker(config)


def _lamb(config: LambConfig) -> Maker:
    settings = asdict(config)
    coeff = (settings.pop("min_coeff"), settings.pop("max_coeff"))
    return Maker(Lamb, {**settings, "coeff": coeff})


def _lars(config: LarsConfig) -> Maker:
    return Maker(Lars, asdict(config))


def _muon(config: MuonConfig) -> Maker:
    settings = asdict(config)
    del settings["muon_lr"]
    return Maker(Muon, {**settings, "lr": config.lr_of_matrices, "adam_lr": config.lr_of_others})


lamb: Plugin = OptimizerPlugin(LambConfig, _lamb)
lars: Plugin = OptimizerPlugin(LarsConfig, _lars)
muon: Plugin = OptimizerPlugin(MuonConfig, _muon)
