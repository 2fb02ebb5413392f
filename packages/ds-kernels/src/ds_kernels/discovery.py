"""Backends of other distributions: found by entry point, loaded only when named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from ds_core.kernel_protocols import KernelBackend

GROUP = "ds.kernels"
"""Entry-point group in which distributions offer kernel backends."""

ROLE_VERSION = 1
"""Version of the backend role that this package speaks."""


class Offer(NamedTuple):
    """An entry point of :data:`GROUP`."""

    name: str
    distribution: str
    point: EntryPoint


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainContext:
    """What a backend is built with when nothing composes the program: ds-core's context, mostly empty."""

    device: torch.device
    """Where tensors live: torch's default device."""
    compute_dtype: None = None
    """Not known here."""
    group: None = None
    """A single process."""
    kernels: None = None
    """None: they are what is being built."""
    compression: None = None
    """None: a single process."""
    gradient_dtype: torch.dtype = torch.float32
    """What torch's optimizers use."""


def offers() -> list[Offer]:
    """List the backends that installed distributions offer, without importing any."""
    # Imported here: a process that runs built-in backends never scans what is installed.
    from importlib.metadata import entry_points

    return sorted(
        Offer(point.name, point.dist.name if point.dist else "unknown distribution", point)
        for point in entry_points(group=GROUP)
    )


def load(name: str, built_in: Sequence[str]) -> KernelBackend:
    """Import and build the backend that another distribution offers.

    Args:
        name: Name of its entry point.
        built_in: Names that need no distribution, for the message.

    Returns:
        The backend.

    Raises:
        ValueError: If no distribution offers ``name``, or more than one does.
        RuntimeError: If it fails to load, or speaks another version of the role.
    """
    found = offers()
    matches = [offer for offer in found if offer.name == name]
    if not matches:
        installed = sorted({*built_in, *(offer.name for offer in found)})
        raise ValueError(
            f"no kernel backend {name!r} is installed; installed are {', '.join(installed)}; "
            f"pip install a distribution that offers it in the entry-point group {GROUP!r}"
        )
    if len(matches) > 1:
        wheels = " and ".join(offer.distribution for offer in matches)
        raise ValueError(f"the kernel backend {name!r} is offered by {wheels}; uninstall all but one")
    return _build(matches[0])


def _build(offer: Offer) -> KernelBackend:
    where = f"the kernel backend {offer.name!r} of {offer.distribution}"
    try:
        plugin = offer.point.load()
        version = plugin.role_version
    except Exception as error:
        raise RuntimeError(
            f"{where} ({offer.point.value}) cannot be loaded: {type(error).__name__}: {error}; repair or "
            "uninstall that distribution"
        ) from error
    if version != ROLE_VERSION:
        raise RuntimeError(
            f"{where} speaks version {version} of the role, this package version {ROLE_VERSION}; install "
            "releases that belong together"
        )
    try:
        config = None if plugin.config_type is None else plugin.config_type()
        backend: KernelBackend = plugin.build(config, PlainContext(device=torch.get_default_device()))
        backend.unusable()  # whatever it says: a backend without it is found out here
    except Exception as error:
        raise RuntimeError(
            f"{where} ({offer.point.value}) cannot be built: {type(error).__name__}: {error}; its settings need "
            "defaults, and what it builds has to play the role KernelBackend"
        ) from error
    return backend
