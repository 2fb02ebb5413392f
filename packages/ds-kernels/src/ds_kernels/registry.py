"""Which kernel backend runs: the one place in a process that owns the choice, and can undo it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from itertools import groupby
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch

from .backends.cpu import CpuBackend
from .backends.reference import ReferenceBackend
from .discovery import load, offers

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend

_BUILT_IN: Mapping[str, Callable[[], KernelBackend]] = MappingProxyType(
    {"cpu": CpuBackend, "reference": ReferenceBackend}
)
_logger = logging.getLogger(__package__)


class BackendInfo(NamedTuple):
    """A backend that is installed."""

    name: str
    provider: str  # "built in", or the distribution
    unusable: str | None  # why it cannot run here; None: it can, or it was never loaded to find out


class Registry:
    """Owns the choice of the kernel backend.

    [Note: Choice]
    Until :meth:`use` names a backend, the choice is automatic: ``cpu`` for tensors in host memory where the
    native module was built, else ``reference``. The first automatic choice for each type of device is logged.
    A program has one registry, :func:`registry`; tests make their own.

    Example:
        >>> owner = Registry()
        >>> with owner.use("reference") as backend:
        ...     owner.current(torch.device("cpu")) is backend
        True
    """

    def __init__(self) -> None:
        self._chosen: KernelBackend | None = None
        self._automatic: dict[str, KernelBackend] = {}  # by type of device
        self._loaded: dict[str, KernelBackend] = {}  # other distributions' backends, by name

    def current(self, device: torch.device) -> KernelBackend:
        """Return the backend for tensors on ``device``. See [Note: Choice]."""
        if self._chosen is not None:
            return self._chosen
        backend = self._automatic.get(device.type)
        if backend is None:
            backend = self._automatic[device.type] = _choose(device)
        return backend

    def use(self, name: str) -> Use:
        """Choose the backend ``name`` from now on; as a context manager, until the block ends.

        Args:
            name: ``cpu``, ``reference``, or a name that an installed distribution offers. The two built-in
                names always mean the built-in backends.

        Returns:
            A context manager that gives the backend, and puts back what was chosen before this call.

        Raises:
            ValueError: If no installed distribution offers ``name``, or more than one does.
            RuntimeError: If the backend cannot run here, cannot be loaded, or speaks another role version.
        """
        backend = self._find(name)
        reason = backend.unusable()
        if reason is not None:
            raise RuntimeError(f"the kernel backend {name!r} cannot run here: {reason}")
        undo = Use(self, backend, self._chosen)
        self._chosen = backend
        return undo

    def put_back(self, backend: KernelBackend | None) -> None:
        """Make ``backend`` the choice again; None makes it automatic. Paired with :meth:`use`."""
        self._chosen = backend

    def backends(self) -> dict[str, BackendInfo]:
        """List the installed backends by name. Those of other distributions are not imported for it."""
        infos = {name: BackendInfo(name, "built in", kind().unusable()) for name, kind in _BUILT_IN.items()}
        for name, same_name in groupby(offers(), key=lambda offer: offer.name):
            wheels = [offer.distribution for offer in same_name]
            if len(wheels) > 1:
                reason: str | None = "offered by more than one distribution; uninstall all but one"
            else:
                reason = self._loaded[name].unusable() if name in self._loaded else None
            infos.setdefault(name, BackendInfo(name, ", ".join(wheels), reason))
        return infos

    def _find(self, name: str) -> KernelBackend:
        if name in _BUILT_IN:
            return _BUILT_IN[name]()
        if name not in self._loaded:
            self._loaded[name] = load(name, tuple(_BUILT_IN))
        return self._loaded[name]


class Use:
    """A choice that can be undone: leaving the block puts back what was chosen before."""

    def __init__(self, owner: Registry, backend: KernelBackend, before: KernelBackend | None) -> None:
        self._owner = owner
        self._backend = backend
        self._before = before

    def __enter__(self) -> KernelBackend:
        return self._backend

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.put_back(self._before)


@functools.cache
def registry() -> Registry:
    """Return the registry of this process.

    The choice of a backend is by nature one per process, so its owner must live somewhere: in this
    function's cache, made at the first call. No module holds it as a variable that others could rebind, and
    importing the package makes nothing.
    """
    return Registry()


def backends() -> dict[str, BackendInfo]:
    """List the installed kernel backends, each with the reason why it cannot run here, if it cannot.

    Example:
        >>> backends()["reference"]
        BackendInfo(name='reference', provider='built in', unusable=None)
    """
    return registry().backends()


def use_backend(name: str) -> Use:
    """Choose the kernel backend of this process; see :meth:`Registry.use`.

    Args:
        name: ``cpu``, ``reference``, or a name that an installed distribution offers.

    Returns:
        A context manager; leaving it puts the earlier choice back. Not entering it makes the choice last.

    Raises:
        ValueError: If ``name`` is not installed, or offered twice.
        RuntimeError: If it cannot run here.

    Example:
        >>> with use_backend("reference") as backend:
        ...     backend.name
        'reference'
    """
    return registry().use(name)


def _choose(device: torch.device) -> KernelBackend:
    if device.type != "cpu":
        _logger.info("no kernel backend is built for %s: using 'reference' (plain torch)", device.type)
        return ReferenceBackend()
    cpu = CpuBackend()
    reason = cpu.unusable()
    if reason is not None:
        _logger.warning("the kernel backend 'cpu' cannot run here: %s; using 'reference' (slower)", reason)
        return ReferenceBackend()
    _logger.info("using the kernel backend 'cpu'")
    return cpu
