"""The entry point ``zero`` of group ``ds.partitioner``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from .api import Parts, shard
from .config import Precision, ZeroConfig
from .kept import outermost
from .kernels import kernels_of
from .sharded import Sharded
from .update import torch_update

if TYPE_CHECKING:
    from ds_core.protocols import BuildContext, OptimizerMaker, ParamGroups


class ZeroPartitioner:
    """Plays the role ``Partitioner``."""

    def __init__(self, config: ZeroConfig, context: BuildContext) -> None:
        self._config = config
        self._context = context

    def shard(
        self,
        model: nn.Module,
        maker: OptimizerMaker | None,
        groups: ParamGroups,
        *,
        separate: Mapping[nn.Parameter, int] = MappingProxyType({}),
    ) -> Sharded:
        """Partition ``model`` in place; see :func:`ds_zero.shard`."""
        context, config, keep_fp32 = self._context, self._config, self._context.keep_fp32
        if context.partial:
            here = {type(module).__name__ for module in model.modules()}
            config = replace(config, unit_classes=tuple(name for name in config.unit_classes if name in here))
            keep_fp32 = tuple(name for name in keep_fp32 if any(outermost(model, [name])))
        kernels = None if context.kernels is None else kernels_of(context.kernels, context.device)
        update = torch_update if maker is None or maker.update is None else maker.update
        return shard(
            model,
            None if maker is None else maker.make,
            config=config,
            group=context.group,
            param_groups=groups,
            precision=Precision(compute=context.compute_dtype, gradient=context.gradient_dtype, keep_fp32=keep_fp32),
            parts=Parts(update=update, kernels=kernels, compression=context.compression, separate=separate),
            device=context.device,
        )


class _Plugin:
    """See [Note: Plugins] in ds-core."""

    role_version = 2
    config_type = ZeroConfig

    def build(self, config: ZeroConfig, context: BuildContext) -> ZeroPartitioner:
        """Return a partitioner for the ranks of ``context``."""
        return ZeroPartitioner(config, context)


zero = _Plugin()
