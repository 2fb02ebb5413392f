"""Fused kernels for torch tensors, with swappable backends."""

from .adamw import Adam, AdamHyper, AdamMaker, AdamW
from .backends.cpu import CpuBackend
from .backends.reference import ReferenceBackend
from .config import AdamConfig
from .registry import BackendInfo, Registry, backends, registry, use_backend

__all__ = [
    "Adam",
    "AdamConfig",
    "AdamHyper",
    "AdamMaker",
    "AdamW",
    "BackendInfo",
    "CpuBackend",
    "ReferenceBackend",
    "Registry",
    "backends",
    "registry",
    "use_backend",
]
