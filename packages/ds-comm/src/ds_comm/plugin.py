"""The entry point ``compressed`` of group ``ds.collectives``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compressed import CompressedCollectives
from .config import CompressionConfig
from .link_aware import LinkAwareCompression

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import BuildContext, Collectives


class Compression:
    """Plays the role ``Compression``: puts codes around collectives.

    Args:
        config: Which codes.
        kernels: Fused kernels of block codes, or None.
    """

    def __init__(self, config: CompressionConfig, kernels: KernelBackend | None = None) -> None:
        self._config = config
        self._kernels = kernels

    @property
    def rounds_weights(self) -> bool:
        """Whether weights that were gathered differ from those that were sent."""
        return self._config.weights is not None

    def around(self, inner: Collectives) -> CompressedCollectives:
        """Return ``inner`` with codes around it."""
        return CompressedCollectives(
            inner,
            weights=self._config.codec_of_weights(self._kernels),
            gradients=self._config.codec_of_gradients(self._kernels),
            error_feedback=self._config.error_feedback,
            error_beta=self._config.error_beta,
            error_reset=self._config.error_reset,
            differences=self._config.weight_differences,
        )


class _Plugin:
    """See [Note: Plugins] in ds-core."""

    role_version = 1
    config_type = CompressionConfig

    def build(self, config: CompressionConfig, context: BuildContext) -> Compression | LinkAwareCompression:
        """Return codes with the kernels of ``context``."""
        if config.auto is not None:
            return LinkAwareCompression(
                config, context.kernels, device=context.device, accumulation=context.accumulation
            )
        return Compression(config, context.kernels)


compressed = _Plugin()
