"""The cpu backend: native kernels, one pass over memory, the instruction set chosen at run time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_adam, check_chunk_sumsq, check_cpu, check_tree_sum, mark_written
from .native.module import FORMATS, native, unusable

if TYPE_CHECKING:
    from ds_core.kernel_protocols import AdamHyper


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuBackend:
    """Native kernels for tensors in host memory.

    [Note: Same bits]
    An element's result depends on its own inputs only: not on the instruction set, the number of threads,
    the length of the array, its alignment or the element's place in it. So a shard gives the same bits as the
    whole. (A NaN stays a NaN; which of the many bit patterns it has is left open, except in copies.)

    Speed is that of memory: a step over float32 moves 28 bytes per element. Uses as many threads as torch
    does (``torch.get_num_threads()``), in torch's own OpenMP runtime.

    Example:
        >>> backend = CpuBackend()
        >>> if backend.unusable() is None:
        ...     assert backend.chunk_sumsq(torch.ones(128), 64).tolist() == [64.0, 64.0]
    """

    isa: str | None = None
    """``avx512``, ``avx2`` or ``scalar``; None takes the fastest the processor runs."""

    @property
    def name(self) -> str:
        """``cpu``."""
        return "cpu"

    def unusable(self) -> str | None:
        """Return why the kernels cannot run here, in one line; None when they can."""
        return unusable(self.isa)

    def find(self, op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
        """Return the kernel of ``op`` for tensors in host memory; None where there is none."""
        if device.type != "cpu" or dtype not in FORMATS:
            return None
        own: dict[str, Callable[..., Any]] = {
            "adamw": self.adamw,
            "tree_sum": self.tree_sum,
            "chunk_sumsq": self.chunk_sumsq,
        }
        if op in own:
            return own[op]
        kernel = _families().get(op)
        return None if kernel is None else functools.partial(kernel, native(self.isa))

    def adamw(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        copy: Tensor | None,
        hyper: AdamHyper,
    ) -> None:
        """Do one Adam or AdamW step, in place, in one pass over memory.

        The formula is that of :meth:`ReferenceBackend.adamw`; operations and their order are those of torch's
        fused CPU kernel.

        Args:
            param: Master parameter, float32.
            grad: Gradient, float32, bfloat16 or float16; left as it is unless ``hyper.zero_grad``.
            exp_avg: First moment, float32.
            exp_avg_sq: Second moment, float32.
            copy: Copy to refresh from the new parameter, bfloat16 or float16, or None.
            hyper: The numbers of the step.

        Raises:
            ValueError: If data types, lengths, devices or layouts do not fit.
            RuntimeError: If the native module is missing.
        """
        check_adam(param, grad, exp_avg, exp_avg_sq, copy)
        check_cpu("param", param)
        # Without decay both forms are the same, and the decoupled one leaves every bit of the gradient.
        decoupled = hyper.decoupled or hyper.weight_decay == 0
        betas = hyper.beta1, hyper.beta2
        native(self.isa).adam(
            (
                (param.data_ptr(), 0, 0),
                (grad.data_ptr(), 0, FORMATS[grad.dtype]),
                [(exp_avg.data_ptr(), 0, 0), (exp_avg_sq.data_ptr(), 0, 0)],
                (0, 0, 0) if copy is None else (copy.data_ptr(), 0, FORMATS[copy.dtype]),
                hyper.zero_grad,
                param.numel(),
                torch.get_num_threads(),
            ),
            (hyper.step, hyper.lr, *betas, hyper.eps, hyper.weight_decay, hyper.scale, decoupled),
        )
        mark_written(param, exp_avg, exp_avg_sq, copy, grad if hyper.zero_grad else None)

    def tree_sum(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        """Sum ``pieces`` in float32 along a binary tree over their order, rounding once into ``out``.

        Reads each piece and writes ``out`` once. The tree is that of :meth:`ReferenceBackend.tree_sum`.

        Args:
            out: Where the sum goes, of any of the three types; may be one of the pieces.
            pieces: Tensors of one length and one type, float32, bfloat16 or float16.

        Raises:
            ValueError: If there are no pieces, or they do not fit each other or ``out``.
            RuntimeError: If the native module is missing.
        """
        check_tree_sum(out, pieces)
        check_cpu("out", out)
        addresses = [piece.data_ptr() for piece in pieces]
        formats = FORMATS[pieces[0].dtype], FORMATS[out.dtype]
        native(self.isa).tree_sum(out.data_ptr(), addresses, out.numel(), *formats, torch.get_num_threads())
        mark_written(out)

    def chunk_sumsq(self, x: Tensor, chunk: int) -> Tensor:
        """Return the float64 sums of squares of the consecutive chunks of ``x``.

        Reads ``x`` once. The tree is that of :meth:`ReferenceBackend.chunk_sumsq`. Threads share the chunks,
        so a single chunk is summed by one thread.

        Args:
            x: Float32, bfloat16 or float16.
            chunk: Elements of a chunk, a multiple of 64 that divides the length of ``x``.

        Returns:
            1D, ``len(x) / chunk``.

        Raises:
            ValueError: If ``chunk`` or ``x`` do not fit.
            RuntimeError: If the native module is missing.
        """
        check_chunk_sumsq(x, chunk)
        check_cpu("x", x)
        sums = torch.empty(x.numel() // chunk, dtype=torch.float64)
        native(self.isa).chunk_sumsq(
            x.data_ptr(), sums.data_ptr(), chunk, sums.numel(), FORMATS[x.dtype], torch.get_num_threads()
        )
        return sums


@functools.cache
def _families() -> Mapping[str, Callable[..., Any]]:
    # Imported at the first use, so that importing the package stays cheap.
    from .native import activations, codecs, dropout, losses, norms, optimizers, softmax

    families = (activations, codecs, dropout, losses, norms, optimizers, softmax)
    return MappingProxyType({op: kernel for family in families for op, kernel in family.KERNELS.items()})
