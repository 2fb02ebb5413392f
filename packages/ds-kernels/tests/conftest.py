"""Backends to test, states to step, and settings that are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from ds_kernels import AdamHyper, CpuBackend, ReferenceBackend
from ds_testkit.cuda_on_host import HostBackend
from torch import Tensor

ISAS = ("scalar", "avx2", "avx512")


def _backends() -> list[pytest.param]:
    rows = [pytest.param(ReferenceBackend(), id="reference")]
    for isa in ISAS:
        backend = CpuBackend(isa=isa)
        reason = backend.unusable()
        skip = pytest.mark.skipif(reason is not None, reason=str(reason))
        rows.append(pytest.param(backend, id=f"cpu-{isa}", marks=skip))
    on_host = HostBackend()
    reason = on_host.unusable()
    skip = pytest.mark.skipif(reason is not None, reason=str(reason))
    return [*rows, pytest.param(on_host, id="nvrtc-on-host", marks=skip)]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_backends())
def backend(request):
    """Every backend, the cpu one once for each instruction set, the GPU kernels on the CPU."""
    return request.param


@pytest.fixture
def on_host() -> HostBackend:
    """The GPU kernels, run on the CPU."""
    backend = HostBackend()
    if (reason := backend.unusable()) is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture
def cpu() -> CpuBackend:
    """The cpu backend on the fastest instruction set."""
    backend = CpuBackend()
    if (reason := backend.unusable()) is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture
def cpu_isas(cpu) -> list[CpuBackend]:
    """The cpu backend on each instruction set of this machine."""
    backends = [CpuBackend(isa=isa) for isa in ISAS]
    return [backend for backend in backends if backend.unusable() is None]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass(frozen=True)
class AdamState:
    """The tensors of one step."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None = None

    def clone(self) -> AdamState:
        return self.map(Tensor.clone)

    def map(self, function: Callable[[Tensor], Tensor]) -> AdamState:
        copy = None if self.copy is None else function(self.copy)
        return AdamState(*map(function, (self.param, self.grad, self.exp_avg, self.exp_avg_sq)), copy)

    def with_grad(self, grad: Tensor) -> AdamState:
        return replace(self, grad=grad)

    def run(self, backend, hyper: AdamHyper) -> AdamState:
        """Step in place and return self."""
        backend.adamw(self.param, self.grad, self.exp_avg, self.exp_avg_sq, copy=self.copy, hyper=hyper)
        return self

    def stepped(self, backend, hyper: AdamHyper) -> AdamState:
        """Step a clone and return it."""
        return self.clone().run(backend, hyper)

    def results(self) -> list[Tensor]:
        kept = [self.param, self.exp_avg, self.exp_avg_sq]
        return kept if self.copy is None else [*kept, self.copy]

    def same_bits(self, other: AdamState) -> bool:
        return all(
            a.dtype == b.dtype and torch.equal(a.view(_BITS[a.dtype]), b.view(_BITS[b.dtype]))
            for a, b in zip(self.results(), other.results(), strict=True)
        )


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture
def adam_state() -> Callable[..., AdamState]:
    """Make a state in the middle of a training run, gradients over many orders of magnitude."""

    def make(numel: int, grad_dtype=torch.float32, copy_dtype=None) -> AdamState:
        generator = torch.Generator().manual_seed(numel)
        noise = [torch.randn(numel, generator=generator) for _ in range(5)]
        grad = noise[1] * torch.exp(3 * noise[2]) * 1e-2
        copy = None if copy_dtype is None else torch.zeros(numel, dtype=copy_dtype)
        return AdamState(noise[0], grad.to(grad_dtype), noise[3] * 1e-2, (noise[4] * 1e-2) ** 2, copy)

    return make


@pytest.fixture
def hyper() -> AdamHyper:
    """The numbers of an ordinary AdamW step."""
    return AdamHyper(step=8, lr=1e-3, weight_decay=0.01)
