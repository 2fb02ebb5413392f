"""Which kernel backend runs: the one place in a process that owns the choice, and can undo it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from .backends.cpu import CpuBackend
from .backends.reference import ReferenceBackend
from .discovery import load, offers

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend


def _nvrtc() -> KernelBackend:
    # Imported here: a process without a GPU should not pay for it.
    from .backends.nvrtc.backend import NvrtcBackend

    return NvrtcBackend()


def _cutlass() -> KernelBackend:
    from .backends.cutlass.backend import CutlassBackend

    return CutlassBackend()


def _triton() -> KernelBackend:
    from .backends.triton.backend import TritonBackend

    return TritonBackend()


_BUILT_IN: Mapping[str, Callable[[], KernelBackend]] = MappingProxyType(
    {"cpu": CpuBackend, "cutlass": _cutlass, "nvrtc": _nvrtc, "reference": ReferenceBackend, "triton": _triton}
)
_ORDER: Mapping[str, Sequence[str]] = MappingProxyType(
    {"cpu": ("cpu", "reference"), "cuda": ("nvrtc", "triton", "reference")}
)
_Key: TypeAlias = "tuple[str, str, torch.dtype]"  # op, type of device, data type
_logger = logging.getLogger(__package__)


class BackendInfo(NamedTuple):
    """A backend that is installed."""

    name: str
    provider: str  # "built in", or the distribution
    unusable: str | None  # why it cannot run here; None: it can, or it was never loaded to find out


class _Found(NamedTuple):
    kernel: Callable[..., Any]
    backend: str


class Registry:
    """Owns the choice of the kernel: one for each op, type of device and data type.

    [Note: Choice]
    A kernel comes from the first of these backends that has one for the op, the device and the data type: the one that
    :meth:`use` named, if any; then, of those in :data:`_ORDER` that can run here, in that order. ``reference`` has all
    ops and comes last. Where the named backend lacks an op, and where a backend of :data:`_ORDER` cannot run, that is
    logged once. A program has one registry, :func:`registry`; tests make their own.

    Example:
        >>> owner = Registry()
        >>> with owner.use("reference"):
        ...     owner.provider("adamw", torch.device("cpu"), torch.float32)
        'reference'
    """

    def __init__(self) -> None:
        self._chosen: KernelBackend | None = None
        self._found: dict[_Key, _Found] = {}  # under the present choice
        self._usable: dict[str, list[KernelBackend]] = {}  # by type of device
        self._loaded: dict[str, KernelBackend] = {}  # other distributions' backends, by name
        self._told: set[tuple[str, str]] = set()  # backend and op

    def kernel(
        self, op: str, device: torch.device, dtype: torch.dtype, first: KernelBackend | None = None
    ) -> Callable[..., Any]:
        """Return the kernel of ``op`` for tensors of one kind. See [Note: Choice].

        Args:
            op: Name of the op.
            device: Where the tensors are.
            dtype: Data type of the op's first tensor.
            first: A backend that comes before the chosen one.

        Raises:
            ValueError: If no backend has ``op``.
        """
        if first is not None and (kernel := first.find(op, device, dtype)) is not None:
            return kernel
        return self._find_kernel(op, device, dtype).kernel

    def provider(self, op: str, device: torch.device, dtype: torch.dtype) -> str:
        """Return the name of the backend that :meth:`kernel` takes ``op`` from."""
        return self._find_kernel(op, device, dtype).backend

    def use(self, name: str | None) -> Use:
        """Choose the backend ``name`` from now on; as a context manager, until the block ends.

        Args:
            name: ``cpu``, ``cutlass``, ``nvrtc``, ``triton``, ``reference``, or a name that an installed distribution
                offers. The built-in names always mean the built-in backends. None: the choice is automatic.

        Returns:
            A context manager that gives the backend, and puts back what was chosen before this call.

        Raises:
            ValueError: If no installed distribution offers ``name``, or more than one does.
            RuntimeError: If the backend cannot run here, cannot be loaded, or speaks another role version.
        """
        backend = None if name is None else self._find(name)
        reason = None if backend is None else backend.unusable()
        if reason is not None:
            raise RuntimeError(f"the kernel backend {name!r} cannot run here: {reason}")
        undo = Use(self, backend, self._chosen)
        self.put_back(backend)
        return undo

    @property
    def chosen(self) -> KernelBackend | None:
        """The backend that :meth:`use` named; None: the choice is automatic."""
        return self._chosen

    def put_back(self, backend: KernelBackend | None) -> None:
        """Make ``backend`` the choice again; None makes it automatic. Paired with :meth:`use`."""
        self._chosen = backend
        self._found.clear()

    def backends(self, *, load: bool = False) -> dict[str, BackendInfo]:
        """List the installed backends by name; see :func:`backends`."""
        infos = {name: BackendInfo(name, "built in", kind().unusable()) for name, kind in _BUILT_IN.items()}
        for name, same_name in groupby(offers(), key=lambda offer: offer.name):
            wheels = [offer.distribution for offer in same_name]
            if len(wheels) > 1:
                reason: str | None = "offered by more than one distribution; uninstall all but one"
            else:
                reason = self._reason(name) if load or name in self._loaded else None
            infos.setdefault(name, BackendInfo(name, ", ".join(wheels), reason))
        return infos

    def _reason(self, name: str) -> str | None:
        """Say why a backend of another distribution cannot be used, loading it if it was not."""
        try:
            return self._find(name).unusable()
        except RuntimeError as error:  # it cannot be loaded, or speaks another version
            return str(error)

    def _find(self, name: str) -> KernelBackend:
        if name in _BUILT_IN:
            return _BUILT_IN[name]()
        if name not in self._loaded:
            self._loaded[name] = load(name, tuple(_BUILT_IN))
        return self._loaded[name]

    def _find_kernel(self, op: str, device: torch.device, dtype: torch.dtype) -> _Found:
        key = op, device.type, dtype
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._search(op, device, dtype)
        return found

    def _search(self, op: str, device: torch.device, dtype: torch.dtype) -> _Found:
        chosen = self._chosen
        for backend in [*([] if chosen is None else [chosen]), *self._automatic(device)]:
            kernel = backend.find(op, device, dtype)
            if kernel is not None:
                return _Found(kernel, backend.name)
            if backend is chosen and (chosen.name, op) not in self._told:
                self._told.add((chosen.name, op))
                _logger.info("the kernel backend %r has no %s for %s on %s", chosen.name, op, dtype, device.type)
        raise ValueError(f"no kernel backend has an op {op!r}; look at the names in ds_kernels.ops")

    def _automatic(self, device: torch.device) -> list[KernelBackend]:
        usable = self._usable.get(device.type)
        if usable is None:
            usable = self._usable[device.type] = _usable_for(device)
        return usable


class Use:
    """A choice that can be undone: leaving the block puts back what was chosen before. It may be entered again."""

    def __init__(self, owner: Registry, backend: KernelBackend | None, before: KernelBackend | None) -> None:
        self._owner = owner
        self._backend = backend
        self._before = before
        self._left = False

    def __enter__(self) -> KernelBackend | None:
        if self._left:
            self._before = self._owner.chosen
            self._owner.put_back(self._backend)
            self._left = False
        return self._backend

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.put_back(self._before)
        self._left = True


class Lookup(dict[tuple[torch.device, torch.dtype], Callable[..., Any]]):
    """The kernels of one op by device and data type, found at the first use of each and kept.

    Args:
        op: Name of the op.
        first: A backend that comes before the process's choice.

    Example:
        >>> lookup = Lookup("tree_sum", ReferenceBackend())
        >>> lookup[torch.device("cpu"), torch.float32].__name__
        'tree_sum'
    """

    def __init__(self, op: str, first: KernelBackend | None) -> None:
        super().__init__()
        self._op = op
        self._first = first

    def __missing__(self, key: tuple[torch.device, torch.dtype]) -> Callable[..., Any]:
        kernel = self[key] = registry().kernel(self._op, *key, self._first)
        return kernel


@functools.cache
def registry() -> Registry:
    """Return the registry of this process.

    The choice of a backend is by nature one per process, so its owner must live somewhere: in this
    function's cache, made at the first call. No module holds it as a variable that others could rebind, and
    importing the package makes nothing.
    """
    return Registry()


def backends(*, load: bool = False) -> dict[str, BackendInfo]:
    """List the installed kernel backends, each with the reason why it cannot run here, if it cannot.

    Args:
        load: Import other distributions' backends to find out; else the reason is known only of those already used.

    Example:
        >>> backends()["reference"]
        BackendInfo(name='reference', provider='built in', unusable=None)
    """
    return registry().backends(load=load)


def use_backend(name: str | None) -> Use:
    """Choose the kernel backend of this process; see :meth:`Registry.use`.

    Args:
        name: ``cpu``, ``cutlass``, ``nvrtc``, ``triton``, ``reference``, or a name that an installed distribution
            offers. None: the choice is automatic.

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


def _usable_for(device: torch.device) -> list[KernelBackend]:
    candidates = [_BUILT_IN[name]() for name in _ORDER.get(device.type, ("reference",))]
    reasons = [backend.unusable() for backend in candidates]
    usable = [backend for backend, reason in zip(candidates, reasons) if reason is None]
    for backend, reason in zip(candidates, reasons):
        if reason is not None:
            message = "the kernel backend %r cannot run here: %s; using %r (slower)"
            _logger.warning(message, backend.name, reason, usable[0].name)
    _logger.info("kernels for %s are taken from: %s", device.type, ", ".join(backend.name for backend in usable))
    return usable
